"""Which tensors of a file make one weight: its numbers, its scales, and the format they are in.

Formats and keys, as found in files that people have:

- plain: one tensor, 16 or 32 bit, or cast to FP8 without a scale;
- ``X.scale_weight`` beside FP8 ``X.weight`` and a tensor ``scaled_fp8`` (Kijai, Comfy-Org);
- ``X.weight_scale`` with ``X.comfy_quant``, uint8 that spells JSON, or the same JSON for all layers
  in the header's ``_quantization_metadata`` (ComfyUI): FP8, INT8, NVFP4, MXFP8;
- ``X.weight_scale`` [N, 1] and no marker (LightX2V): FP8, INT8; its NVFP4 has ``X.alpha`` and
  ``X.input_global_scale``, or ``X.weight_global_scale``;
- GGUF: the type is the tensor's own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagewan.checkpoint.tensors import Stored, told
from sagewan.errors import CheckpointError

FP8 = ("float8_e4m3fn", "float8_e5m2")
_FLOATS = ("float32", "float16", "bfloat16")
MARKER = "scaled_fp8"
_METADATA = "_quantization_metadata"

# What may stand beside a weight, by the ending of its name after the module's.
_SCALES = ("weight_scale", "scale_weight")
_GLOBAL_SCALES = ("weight_scale_2", "weight_global_scale", "alpha")
# Scales of the layer's input: it is quantised anew for each token here, more exactly.
_OF_INPUT = ("input_scale", "scale_input", "input_global_scale", "input_absmax")
_BESIDE = (*_SCALES, *_GLOBAL_SCALES, *_OF_INPUT, "pre_quant_scale", "comfy_quant")

# What ComfyUI calls the formats that are read here.
_COMFY_FORMATS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "float8_e4m3fn": ("float8_e4m3fn", ("float8_e4m3fn",)),
    "float8_e5m2": ("float8_e5m2", ("float8_e5m2",)),
    "int8_tensorwise": ("int8", ("int8",)),
    "nvfp4": ("nvfp4", ("uint8",)),
    "mxfp8": ("mxfp8", ("float8_e4m3fn",)),
}
# Its settings that change nothing in what the numbers mean.
_HARMLESS = ("format", "full_precision_matrix_mult", "group_size", "orig_dtype", "orig_shape")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of a part. ``shape`` is that of its numbers; ``beside`` its scales by their
    endings in the file; ``format`` torch's name of a dtype, or one of
    :class:`sagewan.checkpoint.packed.Packed`, which it becomes if ``is_packed``."""

    data: Stored
    format: str
    shape: tuple[int, ...]
    beside: Mapping[str, Stored] = field(default_factory=dict)
    full_precision: bool = False

    @property
    def is_packed(self) -> bool:
        return len(self.shape) == 2 and (
            self.format in (*FP8, "int8", "nvfp4", "mxfp8") or self.format.startswith("gguf:")
        )

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(stored.nbytes for stored in self.beside.values())

    @property
    def scale(self) -> Stored | None:
        return next((self.beside[name] for name in _SCALES if name in self.beside), None)


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """What is known of a whole file before its weights are looked at one by one."""

    path: Path
    marked: bool
    full_precision: bool
    settings: Mapping[str, Mapping[str, Any]]
    scaled: bool


def weights_of(
    tensors: Mapping[str, Stored], metadata: Mapping[str, Any], path: Path, prefix: str = ""
) -> dict[str, Weight]:
    """Tensors of one part, the ``prefix`` of all their names gone → its weights by those names.

    Raises CheckpointError for scales that are missing, doubled, of a wrong shape or beside nothing,
    and for formats that are not read. What the scales' values are is not looked at.
    """
    beside, weights = _parted(tensors, path)
    marker = tensors.get(MARKER)
    layers = _Layers(
        path=path,
        marked=marker is not None,
        # Two elements, where one would do, are Comfy-Org's word for it.
        full_precision=marker is not None and marker.shape == (2,),
        settings=_settings(metadata, beside, path, prefix),
        scaled=any(name in _SCALES for found in beside.values() for name in found),
    )
    if (layers.marked or layers.settings) and not layers.scaled:
        raise CheckpointError(
            f"{path} is marked as quantised and holds no scales, without which its weights mean "
            "nothing: fetch it again"
        )
    found = {}
    for name, stored in weights.items():
        module = name.removesuffix(".weight") if name.endswith(".weight") else name
        found[name] = _weight(stored, beside.pop(module, {}), module, layers)
    for module, orphans in beside.items():
        if not set(orphans) <= {"comfy_quant", *_OF_INPUT}:
            raise CheckpointError(
                f"{path} holds {module}.{next(iter(orphans))} and no weight {module}.weight that "
                "it belongs to: fetch it again"
            )
    return found


def is_beside(name: str) -> bool:
    """Whether a tensor of this name is a scale or a marker, not a weight."""
    return name == MARKER or name.rpartition(".")[2] in _BESIDE


def _parted(
    tensors: Mapping[str, Stored], path: Path
) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    beside: dict[str, dict[str, Stored]] = {}
    weights = {}
    for name, stored in tensors.items():
        module, _, ending = name.rpartition(".")
        if ending in _BESIDE:
            beside.setdefault(module, {})[ending] = stored
        elif name != MARKER:
            weights[name] = stored
    for module, found in beside.items():
        for group in (_SCALES, _GLOBAL_SCALES[:2]):
            both = [name for name in group if name in found]
            if len(both) > 1:
                raise CheckpointError(
                    f"{path} has two scales for {module}.weight, {' and '.join(both)}, and only "
                    "one can be right: fetch it again"
                )
    return beside, weights


def _weight(stored: Stored, beside: dict[str, Stored], module: str, layers: _Layers) -> Weight:
    settings = layers.settings.get(module, {})
    kind = _format(stored, beside, settings, module, layers)
    weight = Weight(
        data=stored,
        format=kind,
        shape=_shape(stored, kind),
        beside={name: found for name, found in beside.items() if _is_of_use(name)},
        full_precision=bool(settings.get("full_precision_matrix_mult"))
        or (layers.full_precision and kind in FP8),
    )
    for complaint in _complaints(weight, layers):
        raise CheckpointError(f"{layers.path}: {stored.name} {complaint}: fetch it again")
    return weight


def _is_of_use(name: str) -> bool:
    # LightX2V's alpha is 1 / (scale of the input · scale of the weight): it needs the former.
    return name not in (*_OF_INPUT, "comfy_quant") or name == "input_global_scale"


def _format(
    stored: Stored,
    beside: Mapping[str, Stored],
    settings: Mapping[str, Any],
    module: str,
    layers: _Layers,
) -> str:
    if settings:
        return _comfy_format(stored, settings, module, layers)
    if stored.dtype == "uint8" and any(name in beside for name in _GLOBAL_SCALES):
        return "nvfp4"
    scale = beside.get("weight_scale")
    if stored.dtype == "float8_e4m3fn" and scale and scale.dtype in ("uint8", "float8_e8m0fnu"):
        return "mxfp8"
    return stored.dtype


def _comfy_format(stored: Stored, settings: Mapping[str, Any], module: str, layers: _Layers) -> str:
    name = settings.get("format")
    others = [key for key, value in settings.items() if key not in _HARMLESS and value]
    if name not in _COMFY_FORMATS or others:
        what = f"{told(name)} with {told(others[0])}" if others else told(name)
        raise CheckpointError(
            f"{layers.path}: {module} is quantised as {what}, and this version reads "
            f"{', '.join(_COMFY_FORMATS)}: choose a file in one of these"
        )
    kind, dtypes = _COMFY_FORMATS[str(name)]
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{layers.path}: {module} is called {name} and is stored as {stored.dtype}: "
            "fetch it again"
        )
    return kind


def _shape(stored: Stored, kind: str) -> tuple[int, ...]:
    if kind == "nvfp4" and len(stored.shape) == 2:
        return stored.shape[0], 2 * stored.shape[1]
    return stored.shape


def _complaints(weight: Weight, layers: _Layers) -> Iterator[str]:
    """What is wrong with a weight, in the words that follow its name."""
    scale = weight.scale
    if weight.format in FP8:
        # A file that was only cast has no scales at all; embeddings are never scaled.
        linear = len(weight.shape) == 2 and not weight.data.name.endswith(_EMBEDDINGS)
        if scale is None and linear and layers.scaled:
            yield "is quantised and its scale is missing"
    elif weight.format in ("int8", "nvfp4", "mxfp8"):
        if scale is None:
            yield "is quantised and its scale is missing"
    elif weight.data.dtype == "uint8":
        yield "holds bytes whose meaning nothing says (no scale stands beside it)"
    elif scale is not None or "pre_quant_scale" in weight.beside:
        yield f"has a scale and is not quantised ({weight.data.dtype})"
    if scale is not None:
        yield from _scale_complaints(weight, scale)
    before = weight.beside.get("pre_quant_scale")
    inputs = weight.shape[-1:]
    if before and (before.dtype not in _FLOATS or (_elements(before.shape),) != inputs):
        yield f"has a pre_quant_scale of shape {list(before.shape)}, which fits none of its inputs"


# Embeddings are looked up, not multiplied: they have no scales even in files that have.
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "token_embedding.weight",
               "relative_attention_bias.weight", "pos_embedding.embedding.weight")  # fmt: skip


def _scale_complaints(weight: Weight, scale: Stored) -> Iterator[str]:
    if len(weight.shape) != 2:
        yield "is quantised and is no matrix"
        return
    rows, columns = weight.shape
    if weight.format in ("nvfp4", "mxfp8"):
        group = 16 if weight.format == "nvfp4" else 32
        dtypes = ("float8_e4m3fn",) if group == 16 else ("uint8", "float8_e8m0fnu")
        if columns % group or rows % 16:
            yield f"has the shape {list(weight.shape)}, which {weight.format} is not padded to"
        # cuBLAS's swizzle is of whole tiles of 128 rows and 4 blocks.
        padded = (_up(rows, 128), _up(columns // group, 4))
        if scale.dtype not in dtypes or _elements(scale.shape) != padded[0] * padded[1]:
            yield (
                f"has scales of shape {list(scale.shape)} ({scale.dtype}), and {weight.format} "
                f"takes {list(padded)} ({dtypes[-1]})"
            )
    elif scale.dtype not in _FLOATS:
        yield f"has scales in {scale.dtype}, which are no scales"
    elif _elements(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
        yield f"has scales of shape {list(scale.shape)}, which fit none of its {rows} rows"
    if weight.format == "nvfp4":
        yield from _nvfp4_complaints(weight)


def _nvfp4_complaints(weight: Weight) -> Iterator[str]:
    found = [name for name in _GLOBAL_SCALES if name in weight.beside]
    if not found:
        yield "is quantised and the scale of the whole tensor is missing"
    elif found == ["alpha"] and "input_global_scale" not in weight.beside:
        yield "has alpha without input_global_scale, so that its scale can't be told"
    for name in (*found, "input_global_scale"):
        stored = weight.beside.get(name)
        if stored and (stored.dtype != "float32" or _elements(stored.shape) != 1):
            yield f"has a {name} that is no single float32 number"


def _settings(
    metadata: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Stored]],
    path: Path,
    prefix: str,
) -> dict[str, Mapping[str, Any]]:
    """Module → what ComfyUI's markers say of it."""
    found = {
        module.removeprefix(prefix): settings
        for module, settings in _from_metadata(metadata, path)
        if module.startswith(prefix) or module in beside
    }
    for module, tensors in beside.items():
        if "comfy_quant" in tensors:
            found[module] = _json(tensors["comfy_quant"].head(), f"{module}.comfy_quant", path)
    return found


def _from_metadata(
    metadata: Mapping[str, Any], path: Path
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if _METADATA not in metadata:
        return
    layers = _json(str(metadata[_METADATA]).encode(), _METADATA, path).get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{path}: {_METADATA} names no layers: fetch it again")
    for module, settings in layers.items():
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{path}: {_METADATA} says nothing of {told(module)}: fetch it again"
            )
        yield module, settings


def _json(text: bytes, name: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text.rstrip(b"\0"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {name} is not the JSON it should be: fetch it again")
    return found


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
