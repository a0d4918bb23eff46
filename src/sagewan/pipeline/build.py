"""Plan → components: the models of a folder, each loaded when it is its turn and freed after.

diffusers' and transformers' classes are used as they are, and filled from the files; the hub is
never asked. The transformer has the plan's dtype, but for the modules that diffusers keeps in
float32; the CLIP image encoder and the VAE are float32, as diffusers' examples advise, but for the
VAE's decoder, which the plan decides.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.calibration import by_layer
from sagewan.checkpoint.infer import config_of
from sagewan.checkpoint.roles import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE
from sagewan.checkpoint.source import open_source
from sagewan.checkpoint.tokenizer import load_tokenizer
from sagewan.errors import CheckpointError
from sagewan.model.attention import Attention
from sagewan.model.blocks import Blocks
from sagewan.model.linear import Multiplier
from sagewan.model.vae import with_channels_last
from sagewan.pipeline.fill import (
    Packing,
    damage_told,
    empty,
    fill,
    kept_in_float32,
)
from sagewan.pipeline.loaded import Loaded, Part
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.settings import check_processor, check_vae
from sagewan.pipeline.step_cache import Forwards
from sagewan.plan.decoding import EXACT, Decoding
from sagewan.plan.lora import LoraFile
from sagewan.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of a run. ``transformers`` has two for Wan 2.2 A14B: high noise, low noise; the
    ``decoder`` is the VAE as the plan decodes with it, which may be the same part."""

    tokenizer: Any
    text_encoder: Part
    vae: Part
    decoder: Part
    transformers: tuple[Part, ...]
    image_encoder: Part | None
    image_processor: Any
    attention: Attention
    multiplier: Multiplier
    forwards: Forwards
    blocks: Blocks

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A block whose calls are counted only if nothing fails in it."""
        with self.attention.whole(), self.multiplier.whole(), self.blocks.whole():
            yield

    @property
    def weight_bytes(self) -> int:
        """Bytes of the transformers that have run."""
        return sum(part.weight_bytes for part in self.transformers)

    @property
    def formats(self) -> dict[str, int]:
        """How many matrices of the transformers that have run are stored in each format."""
        counts: Counter[str] = Counter()
        for part in self.transformers:
            counts.update(part.formats)
        return dict(counts)

    @property
    def pinned_bytes(self) -> int:
        """The most host memory that was pinned for one of the parts."""
        return max(part.pinned_bytes for part in (self.text_encoder, *self.transformers))

    @property
    def unpinned_blocks(self) -> int:
        """The most swapped blocks of a transformer that were copied from ordinary memory."""
        return max(part.unpinned_blocks for part in self.transformers)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why less host memory was pinned than planned, in sentences."""
        parts = (self.text_encoder, *self.transformers)
        return tuple(dict.fromkeys(part.refusal for part in parts if part.refusal))


def build(
    plan: Plan, launcher: Launcher, loaded: Loaded | None = None, watch: Watch | None = None
) -> Components:
    """Components of the plan's model, whose self-attention runs through ``launcher``.

    Loads the tokenizer; the models follow when they are used, unless they are ``loaded`` from the
    run before. What else it has is freed. ``watch`` is told how the quantising goes.
    """
    parts = plan.model.parts
    if not parts:
        raise CheckpointError(f"model={plan.model.name}: only its name is known, not its files")
    dtype: torch.dtype = getattr(torch, plan.dtype)
    names = ("transformer", "transformer_2")[: plan.model.experts]
    with_picture = plan.model.image_encoder
    shelf = _Shelf(loaded or Loaded(keeps=False), parts, plan.dtype)
    watch = watch or Watch()
    components = Components(
        tokenizer=_tokenizer(parts["tokenizer"]),
        text_encoder=shelf.part(
            "text_encoder", partial(_text_encoder, dtype=dtype), lambda m: m.encoder.block
        ),
        vae=shelf.part("vae", load_vae),
        decoder=shelf.decoder(plan.decoding),
        transformers=tuple(
            shelf.expert(
                name,
                partial(_expert, name=name, plan=plan, watch=watch),
                _stored(plan, name),
                tuple(file for file in plan.loras if index in file.experts),
            )
            for index, name in enumerate(names)
        ),
        image_encoder=shelf.part("image_encoder", _image_encoder) if with_picture else None,
        image_processor=_image_processor(parts.get("image_processor"), parts["image_encoder"])
        if with_picture
        else None,
        attention=Attention(launcher),
        multiplier=Multiplier(),
        forwards=Forwards(),
        blocks=Blocks(),
    )
    shelf.close()
    return components


@dataclass
class _Shelf:
    """The parts of one model that runs share, each under all that its weights depend on."""

    loaded: Loaded
    parts: Mapping[str, Path]
    dtype: str
    _keys: list[tuple[Path, str, str, str]] = field(default_factory=list)

    def part(
        self,
        name: str,
        load: Callable[[Path], Any],
        blocks: Callable[[Any], Any] | None = None,
        stored: str = "",
    ) -> Part:
        path = self.parts[name]
        key = (path, name, self.dtype, stored)
        self._keys.append(key)
        loaded = partial(load, path)
        part = Part(name, loaded, blocks) if blocks else Part(name, loaded)
        return self.loaded.part(key, part)

    def expert(
        self, name: str, load: Callable[[Path], Any], stored: str, loras: tuple[LoraFile, ...]
    ) -> Part:
        """A transformer, stored so, with the LoRAs that this run wants on it."""
        part = self.part(name, load, lambda transformer: transformer.blocks, stored)
        part.loras = loras
        return part

    def decoder(self, decoding: Decoding) -> Part:
        if not decoding.rounds:
            return self.part("vae", load_vae)
        return self.part("vae", partial(load_vae, decoding=decoding), stored=decoding.dtype)

    def close(self) -> None:
        """Free whatever else is loaded."""
        self.loaded.only(self._keys)


def _stored(plan: Plan, name: str) -> str:
    """All that a transformer's weights in memory depend on, beside its files and the dtype."""
    measured = plan.weights.measured.get(name)
    # Measured again, it is quantised again.
    when = f" by {measured} of {measured.stat().st_mtime_ns}" if measured else ""
    return (plan.weights.format or ("unpacked" if plan.weights.unpacks else "")) + when


def _expert(path: Path, name: str, plan: Plan, watch: Watch) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    source = open_source(path, TRANSFORMER)
    with damage_told(path):
        transformer = empty(lambda: WanTransformer3DModel.from_config(config_of(source)))
    weights, dtype = plan.weights, getattr(torch, plan.dtype)
    packing = Packing(
        formats=lambda layer: weights.format if weights.quantises(layer) else None,
        directions=by_layer(weights.measured.get(name)),
        unpacks=weights.unpacks,
        device=plan.device.torch_name,
        told=lambda done, _all: watch.step(done),
    )
    if weights.format is None or plan.model.quantized:
        packing = replace(packing, told=lambda *_: watch.check())
        return fill(transformer, source, dtype, kept_in_float32(WanTransformer3DModel), packing)
    with watch.within(f"quantising {path.name}", len(source.entries)):
        return fill(transformer, source, dtype, kept_in_float32(WanTransformer3DModel), packing)


def load_vae(path: Path, decoding: Decoding = EXACT) -> Any:
    """The VAE of a folder or file, in the dtype and the layout of its decoding."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    source = open_source(path, VAE)
    with damage_told(path):
        vae = empty(lambda: AutoencoderKLWan.from_config(config_of(source)))
        check_vae(vae.config, path)
    fill(vae, source, getattr(torch, decoding.dtype))
    return with_channels_last(vae) if decoding.channels_last else vae


def _text_encoder(path: Path, dtype: torch.dtype) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    source = open_source(path, TEXT_ENCODER)
    with damage_told(path):
        encoder = empty(lambda: UMT5EncoderModel(UMT5Config.from_dict(config_of(source))))
    # UMT5 was trained in bfloat16 and leaves float16's range, also on cards that compute in it.
    return fill(encoder, source, torch.bfloat16 if dtype == torch.float16 else dtype)


def _image_encoder(path: Path) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    source = open_source(path, IMAGE_ENCODER)
    with damage_told(path):
        config = CLIPVisionConfig.from_dict(config_of(source))
        encoder = empty(lambda: CLIPVisionModel(config))
    return fill(encoder, source, torch.float32)


def _tokenizer(path: Path) -> Any:
    with damage_told(path):
        return load_tokenizer(path)


def _image_processor(path: Path | None, encoder: Path) -> Any:
    """The one of a folder; without one, CLIP's own settings, which are those of Wan's. Tried on a
    picture that is made of what the encoder at the other path takes."""
    import transformers

    # Newer releases have two, and the one on Pillow needs no torchvision.
    pillow = hasattr(transformers, "CLIPImageProcessorPil")
    processor = getattr(transformers, "CLIPImageProcessorPil" if pillow else "CLIPImageProcessor")
    with damage_told(path or encoder):
        made = (
            processor() if path is None else processor.from_pretrained(path, local_files_only=True)
        )
        check_processor(made, config_of(open_source(encoder, IMAGE_ENCODER))["image_size"], path)
    return made
