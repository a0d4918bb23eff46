"""A model from a single file, or from files in other layouts than diffusers': its transformers are
given, its other parts are looked for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sagewan.checkpoint.architecture import Architecture
from sagewan.checkpoint.describe import Traits, is_published, model_of, nearest
from sagewan.checkpoint.experts import Experts, find_experts
from sagewan.checkpoint.folder import read_model
from sagewan.checkpoint.infer import config_of, main_dtypes, quantized_as
from sagewan.checkpoint.places import Search
from sagewan.checkpoint.roles import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE
from sagewan.checkpoint.source import Source
from sagewan.checkpoint.tokenizer import has_tokenizer
from sagewan.errors import CheckpointError
from sagewan.plan.models import PUBLISHED, Model

# Where the second expert of Wan 2.2 A14B begins (github.com/Wan-Video/Wan2.2, wan/configs).
_BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
# The channels of a VAE: Wan 2.2's own makes latents of 16 pixels, Wan 2.1's of 8.
_WAN_2_2_VAE = {"z_dim": 48, "scale_factor_spatial": 16, "scale_factor_temporal": 4}


def assemble(path: Path, name: str, *, need_files: bool = True) -> Model:
    """The model whose transformer is in this file or folder.

    Its other parts are found around it; with ``need_files`` false they are not looked for. Raises
    CheckpointError, which names what is missing and where to put it.
    """
    experts = find_experts(path)
    home = _home(experts.paths[0])
    if home is not None:
        model = read_model(home, name, experts.paths)
        return replace(model, location=path, notes=(*model.notes, *experts.notes))
    if not need_files:
        vae = _WAN_2_2_VAE if experts.architecture.out_channels == 48 else {}
        return replace(_described(experts, vae, path, name), location=path)
    return _with_parts(experts, path, name)


def _home(path: Path) -> Path | None:
    """The diffusers folder that a file lies in, to stand in for its transformer."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def _described(experts: Experts, vae: dict[str, Any], vae_path: Path, name: str) -> Model:
    architecture = experts.architecture
    boundary = None
    if len(experts.paths) == 2:
        pictures = architecture.in_channels > architecture.out_channels
        boundary = _BOUNDARIES["i2v" if pictures else "t2v"]
    traits = Traits(
        architecture=architecture,
        vae={"z_dim": architecture.out_channels, **vae},
        # Only TI2V has Wan 2.2's VAE, and every token its own time.
        expand_timesteps=vae.get("scale_factor_spatial") == 16,
        boundary=boundary,
        config=experts.paths[0],
        vae_config=vae_path,
    )
    model = replace(model_of(traits, name), quantized=quantized_as(experts.sources[0]))
    near = nearest(model)
    notes = (*experts.notes, *_guesses(model, near))
    return replace(model, family=near.family, sampling=near.sampling, notes=notes)


def _guesses(model: Model, near: Model) -> Iterator[str]:
    """What nothing in the files tells, and what was made of it."""
    if not is_published(model, near):
        yield f"its size is of no published model: it samples as {near.name} does"
        return
    twins = [
        one.name for one in PUBLISHED.values() if one.experts == 2 and is_published(model, one)
    ]
    if model.experts == 1 and twins:
        yield (
            f"it is taken for {near.name}: one expert of {twins[0]} has the same shape, and is "
            "known by high or low in its name"
        )


def _with_parts(experts: Experts, path: Path, name: str) -> Model:
    search = Search(experts.paths[0])
    architecture = experts.architecture
    vae = search.weights(
        VAE, lambda found: _side(found, "post_quant_conv.weight", 0) == architecture.out_channels
    )
    if vae is None:
        raise _missing(f"VAE of {architecture.out_channels} channels", search)
    model = _described(experts, config_of(vae), vae.path, name)
    text_encoder = search.weights(
        TEXT_ENCODER, lambda found: _side(found, "shared.weight", 1) == architecture.text_dim
    )
    if text_encoder is None:
        raise _missing(f"text encoder (UMT5 of {architecture.text_dim} features)", search)
    parts = {VAE: vae.path, TEXT_ENCODER: text_encoder.path}
    parts |= dict(zip(("transformer", "transformer_2"), experts.paths, strict=False))
    parts["tokenizer"] = _tokenizer(text_encoder, search)
    parts |= _image_parts(architecture, search)
    files = {TRANSFORMER: experts.sources[0].files, TEXT_ENCODER: text_encoder.files}
    return replace(model, location=path, parts=parts, dtypes=main_dtypes(files))


def _side(source: Source, name: str, index: int) -> int | None:
    """One side of a weight, which tells what the part fits to; None if it has no such side."""
    shape = source.shape(name) or ()
    return shape[index] if index < len(shape) else None


def _tokenizer(text_encoder: Source, search: Search) -> Path:
    if has_tokenizer(text_encoder):
        return text_encoder.path
    found = search.tokenizer(text_encoder.path)
    if found is None:
        raise _missing("tokenizer (the folder google/umt5-xxl, or tokenizer)", search)
    return found


def _image_parts(architecture: Architecture, search: Search) -> dict[str, Path]:
    if architecture.image_dim is None:
        return {}
    found = search.weights(
        IMAGE_ENCODER,
        lambda found: _side(found, "pre_layrnorm.weight", 0) == architecture.image_dim,
    )
    if found is None:
        raise _missing(f"image encoder (CLIP of {architecture.image_dim} features)", search)
    processor = search.image_processor(found.path)
    parts = {IMAGE_ENCODER: found.path}
    return parts | ({"image_processor": processor} if processor else {})


def _missing(what: str, search: Search) -> CheckpointError:
    damaged = f" ({search.complaints[0]})" if search.complaints else ""
    return CheckpointError(
        f"model={search.path}: its {what} is missing{damaged}; looked for {search.looked_in()}: "
        "put it there, or fetch a whole model with sagewan download"
    )
