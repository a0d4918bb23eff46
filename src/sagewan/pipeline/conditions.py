"""What the transformer is told beside the noisy latents: the text, and the pictures.

The numbers are those of diffusers' WanPipeline and WanImageToVideoPipeline (0.42).
"""

import html
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ftfy
import torch
from torch import Tensor

from sagewan.memory.placement import Place
from sagewan.model.vae import encode as encode_pieces
from sagewan.pipeline.build import Components
from sagewan.plan.models import TEXT_TOKENS
from sagewan.plan.plan import Plan

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Tensors on the plan's device.

    ``prompt`` [1, 512, D], or [B, 512, D] for a batch, and ``negative`` [1, 512, D], the latter
    None where no step is guided; ``picture`` CLIP's tokens [P, 257, D] of P pictures (Wan 2.1);
    ``latents`` what is known of the video's latents, float32: for Wan 2.1 and A14B the mask and the
    picture's latents, put beside the noisy ones as channels [1, 4 + C, F, H, W]; for TI2V the
    first frame's [1, C, 1, H, W].
    """

    prompt: Tensor
    negative: Tensor | None = None
    picture: Tensor | None = None
    latents: Tensor | None = None


def encode(
    components: Components,
    plan: Plan,
    pictures: "Mapping[str, Image]",
    prompts: Sequence[str] = (),
) -> Conditions:
    """Text and pictures → conditions. ``pictures`` by the request's fields, ``image`` and
    ``last_image``, as ``load_picture`` gives them; empty for text to video. ``prompts`` are those
    of a batch, in place of the plan's own."""
    return with_pictures(encode_prompts(components, plan, prompts), components, plan, pictures)


@torch.inference_mode()
def encode_prompts(components: Components, plan: Plan, prompts: Sequence[str] = ()) -> Conditions:
    """The text of the conditions, as :func:`encode`."""
    memory = plan.memory
    place = Place(
        device=plan.device.torch_name,
        swapped=memory.text_swap,
        pin_budget=memory.text_pin_budget,
    )
    with components.text_encoder.on(place) as encoder:
        prompt = encode_text(prompts or [plan.request.prompt], components.tokenizer, encoder)
        negative = None
        if _guided(plan):
            negative = encode_text([plan.negative], components.tokenizer, encoder)
    return Conditions(prompt=prompt, negative=negative)


@torch.inference_mode()
def with_pictures(
    text: Conditions, components: Components, plan: Plan, pictures: "Mapping[str, Image]"
) -> Conditions:
    """The conditions with the pictures beside the text, as :func:`encode`."""
    if not pictures:
        return text
    device = plan.device.torch_name
    ordered = [pictures[name] for name in ("image", "last_image") if name in pictures]
    picture = None
    if components.image_encoder is not None:
        with components.image_encoder.on(device) as encoder:
            picture = encode_pictures(ordered, components.image_processor, encoder)
    with components.vae.on(device) as vae:
        latents = encode_frames(ordered, plan, vae)
    return replace(text, picture=picture, latents=latents)


def conditions_key(plan: Plan) -> Hashable:
    """All that the conditions depend on."""
    paths = (plan.request.image, plan.request.last_image)
    pictures = tuple((path.absolute(), path.stat().st_mtime_ns) for path in paths if path)
    negative = plan.negative if _guided(plan) else None
    model = (plan.model.location, plan.dtype, plan.device.torch_name)
    return (*model, plan.request.prompt, negative, pictures, plan.grid_size, plan.frames)


def _guided(plan: Plan) -> bool:
    """Whether any step is guided, so that the negative prompt plays a part."""
    return max(plan.steps.passes) > 1


def clean(text: str) -> str:
    """Broken Unicode repaired, HTML entities resolved twice, white space made single."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def encode_text(texts: Sequence[str], tokenizer: Any, encoder: Any) -> Tensor:
    """UMT5's features [B, 512, D], zero behind the last token; longer text is cut at 512."""
    tokens = tokenizer(
        [clean(text) for text in texts],
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.to(encoder.device)
    features: Tensor = encoder(tokens.input_ids.to(encoder.device), mask).last_hidden_state
    return features.masked_fill(mask.unsqueeze(-1) == 0, 0)


def encode_pictures(pictures: "Sequence[Image]", processor: Any, encoder: Any) -> Tensor:
    """CLIP's last layer but one, [P, 257, D] float32. The processor resizes on its own."""
    pixels = processor(images=list(pictures), return_tensors="pt").pixel_values
    states = encoder(pixels.to(encoder.device), output_hidden_states=True).hidden_states
    features: Tensor = states[-2]
    return features


def encode_frames(pictures: "Sequence[Image]", plan: Plan, vae: Any) -> Tensor:
    """The pictures' part in the latents, float32; see :class:`Conditions` for its two shapes."""
    pixels = [_pixels(picture, plan).to(vae.device) for picture in pictures]
    first, last = pixels[0], pixels[1:]
    count = 1 if plan.model.expand_timesteps else plan.frames

    def frames(start: int, stop: int) -> Tensor:
        """The given pictures at their ends, and nothing between."""
        found = first.new_zeros(1, 3, stop - start, *first.shape[3:])
        if start == 0:
            found[:, :, :1] = first
        if stop == count and last:
            found[:, :, -1:] = last[0]
        return found

    latents = normalized(encode_pieces(frames, count, vae, plan.memory.encode_tile), vae)
    if plan.model.expand_timesteps:
        return latents
    return torch.cat([_known(latents, plan, bool(last)), latents], dim=1)


def normalized(latents: Tensor, vae: Any) -> Tensor:
    """The VAE's latents [1, C, F, H, W] with the mean and deviation the transformer expects."""
    mean, deviation = _statistics(vae, latents)
    return (latents - mean) * (1.0 / deviation)


def denormalized(latents: Tensor, vae: Any) -> Tensor:
    """The inverse of :func:`normalized`."""
    mean, deviation = _statistics(vae, latents)
    return latents / (1.0 / deviation) + mean


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(value).view(1, -1, 1, 1, 1).to(like) for value in values)
    return mean, deviation


def _pixels(picture: "Image", plan: Plan) -> Tensor:
    """A picture resized to the grid, [1, 3, 1, H, W] in −1 … 1, by diffusers' own processor."""
    from diffusers.video_processor import VideoProcessor

    width, height = plan.grid_size
    processor = VideoProcessor(vae_scale_factor=plan.model.spatial)
    pixels: Tensor = processor.preprocess(picture, height=height, width=width)
    return pixels.float().unsqueeze(2)


def _known(latents: Tensor, plan: Plan, with_last: bool) -> Tensor:
    """The mask [1, 4, F, H, W]: 1 where a frame is given. The four channels of a latent frame
    are its four frames; the first latent frame has one frame, which fills all four."""
    _, _, count, height, width = latents.shape
    known = latents.new_zeros(1, count * plan.model.temporal, height, width)
    known[:, : plan.model.temporal] = 1
    if with_last:
        known[:, -1] = 1
    by_latent: Tensor = known.unflatten(1, (count, plan.model.temporal))
    return by_latent.transpose(1, 2)
