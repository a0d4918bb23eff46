"""Latents → frames, by diffusers' VAE, one latent frame at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sagewan.pipeline.build import Components
from sagewan.pipeline.conditions import denormalized
from sagewan.pipeline.guard import FrameGuard
from sagewan.plan.plan import Plan

# What one call of the decoder may make of several videos: 16 pieces of four frames of 256 × 256.
_PIXELS = 16 * 4 * 256 * 256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@torch.inference_mode()
def decode(
    components: Components, plan: Plan, latents: Tensor, guard: FrameGuard
) -> "Iterator[NDArray[np.uint8]]":
    """Latents [1, C, F, H, W] → the video's frames, uint8 RGB [height, width, 3], one by one.

    A latent frame is decoded when its first frame is asked for, so only a few frames are in
    memory, and a caller may stop between two. Frames are cut from the grid about their centre to
    the plan's size, so that what stood in the middle stays there. The guard is shown what bytes
    can't tell: whether every value was finite.
    """
    with components.vae.on(plan.device.torch_name) as vae:
        for piece in decode_pieces(latents, vae):
            guard.see_values(finite=bool(piece.isfinite().all()))
            yield from _cropped(_bytes(piece), plan.size)[0].cpu().numpy()


@torch.inference_mode()
def decode_batch(components: Components, plan: Plan, latents: Tensor) -> Tensor:
    """Latents [B, C, F, H, W] → all frames, uint8 RGB [B, T, height, width, 3] on the device: the
    values that :func:`decode` gives. A few videos are decoded at a time."""
    width, height = plan.grid_size
    at_once = max(1, _PIXELS // (width * height * plan.model.temporal))
    with components.vae.on(plan.device.torch_name) as vae:
        videos = [
            torch.cat([_cropped(_bytes(x), plan.size) for x in decode_pieces(part, vae)], dim=1)
            for part in latents.split(at_once)
        ]
    return torch.cat(videos)


def decode_pieces(latents: Tensor, vae: Any) -> Iterator[Tensor]:
    """Float32 pieces [B, 3, f, H, W]; put together, and clamped to −1 … 1, they are
    ``vae.decode``'s result. The first latent frame gives one frame, each later one four.

    The decoder is causal: between two latent frames it carries on what each of its convolutions
    saw last. That memory is an argument of it, and a list of ours.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    hidden = vae.post_quant_conv(denormalized(latents.to(vae.device, vae.dtype), vae))
    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    memory: list[Any] = [None] * convolutions
    for index in range(hidden.shape[2]):
        piece = vae.decoder(
            hidden[:, :, index : index + 1],
            feat_cache=memory,
            feat_idx=[0],
            first_chunk=index == 0,
        )
        if vae.config.patch_size is not None:
            piece = unpatchify(piece, patch_size=vae.config.patch_size)
        yield piece


def _bytes(piece: Tensor) -> Tensor:
    """[B, 3, f, H, W], clamped to −1 … 1 → uint8 [B, f, H, W, 3], rounded; NaN is black."""
    levels = (piece.clamp(-1, 1).movedim(1, -1).float() * 0.5 + 0.5) * 255
    return levels.nan_to_num(0).round().to(torch.uint8)


def _cropped(frames: Tensor, size: tuple[int, int]) -> Tensor:
    width, height = size
    top, left = (frames.shape[-3] - height) // 2, (frames.shape[-2] - width) // 2
    return frames[..., top : top + height, left : left + width, :]
