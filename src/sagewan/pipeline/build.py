"""Plan → components: the models of a folder, each loaded when it is its turn and freed after.

diffusers' and transformers' classes are used as they are, and filled from the files; the hub is
never asked. The transformer has the plan's dtype, but for the modules that diffusers keeps in
float32; the VAE and the CLIP image encoder are float32, as diffusers' examples advise.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.roles import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE
from sagewan.checkpoint.source import open_source
from sagewan.errors import CheckpointError
from sagewan.model.attention import Attention
from sagewan.pipeline.fill import check_statistics, damage_told, empty, fill, kept_in_float32
from sagewan.plan.plan import Plan

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """One model of a run. Weights that keep their dtype stay in the file's pages, so loading
    again costs little, and a part that waits for its turn costs no memory of its own.

    ``weight_bytes`` is what its weights take in memory, 0 until it is first loaded.
    """

    name: str
    load: Callable[[], Any]
    weight_bytes: int = 0

    @contextmanager
    def on(self, device: str) -> Iterator[Any]:
        """The module in evaluation mode on ``device``, freed at the end of the block.

        Raises CheckpointError if a weight is missing or has another shape than the config says.
        """
        logger.info("loading %s", self.name)
        module = self.load().eval().requires_grad_(False).to(device)
        self.weight_bytes = sum(weight.nbytes for weight in module.parameters())
        try:
            yield module
        finally:
            # Dropping the name is not enough: whoever still holds the module, if only the
            # traceback of an error, would hold its memory.
            module.to("meta")
            if device != "cpu":
                torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of a run. ``transformers`` has two for Wan 2.2 A14B: high noise, low noise."""

    tokenizer: Any
    text_encoder: Part
    vae: Part
    transformers: tuple[Part, ...]
    image_encoder: Part | None
    image_processor: Any
    attention: Attention

    @property
    def weight_bytes(self) -> int:
        """Bytes of the transformers that have run."""
        return sum(part.weight_bytes for part in self.transformers)


def build(plan: Plan, launcher: Launcher) -> Components:
    """Components of the plan's model, whose self-attention runs through ``launcher``.

    Loads the tokenizer; the models follow when they are used.
    """
    location = plan.model.location
    if location is None:
        raise CheckpointError(f"model={plan.model.name}: only its name is known, not its files")
    attention = Attention(launcher)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    names = ("transformer", "transformer_2")[: plan.model.experts]
    with_picture = plan.model.image_encoder
    return Components(
        tokenizer=_tokenizer(location),
        text_encoder=Part("text_encoder", lambda: _text_encoder(location, dtype)),
        vae=Part("vae", lambda: _vae(location)),
        transformers=tuple(_expert(location, name, dtype, attention) for name in names),
        image_encoder=Part("image_encoder", lambda: _image_encoder(location))
        if with_picture
        else None,
        image_processor=_image_processor(location) if with_picture else None,
        attention=attention,
    )


def _expert(location: Path, name: str, dtype: torch.dtype, attention: Attention) -> Part:
    def load() -> Any:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        source = open_source(location / name, TRANSFORMER)
        with damage_told(source.path):
            transformer = empty(lambda: WanTransformer3DModel.from_config(source.config))
        fill(transformer, source, dtype, kept_in_float32(WanTransformer3DModel))
        attention.install(transformer)
        return transformer

    return Part(name, load)


def _vae(location: Path) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    source = open_source(location / "vae", VAE)
    with damage_told(source.path):
        vae = empty(lambda: AutoencoderKLWan.from_config(source.config))
        check_statistics(vae.config, source.path)
    return fill(vae, source, torch.float32)


def _text_encoder(location: Path, dtype: torch.dtype) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    source = open_source(location / "text_encoder", TEXT_ENCODER)
    with damage_told(source.path):
        encoder = empty(lambda: UMT5EncoderModel(UMT5Config.from_dict(dict(source.config or {}))))
    # UMT5 was trained in bfloat16 and leaves float16's range, also on cards that compute in it.
    return fill(encoder, source, torch.bfloat16 if dtype == torch.float16 else dtype)


def _image_encoder(location: Path) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    source = open_source(location / "image_encoder", IMAGE_ENCODER)
    with damage_told(source.path):
        config = CLIPVisionConfig.from_dict(dict(source.config or {}))
        encoder = empty(lambda: CLIPVisionModel(config))
    return fill(encoder, source, torch.float32)


def _tokenizer(location: Path) -> Any:
    from transformers import AutoTokenizer

    folder = location / "tokenizer"
    with damage_told(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{folder} names no padding token: fetch its files again")
    return tokenizer


def _image_processor(location: Path) -> Any:
    import transformers

    # Newer releases have two, and the one on Pillow needs no torchvision.
    pillow = hasattr(transformers, "CLIPImageProcessorPil")
    processor = getattr(transformers, "CLIPImageProcessorPil" if pillow else "CLIPImageProcessor")
    folder = location / "image_processor"
    with damage_told(folder):
        return processor.from_pretrained(folder, local_files_only=True)
