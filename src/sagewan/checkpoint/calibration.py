"""What was measured of the inputs of a transformer's layers, which quantising rounds weights by.

``sagewan calibrate --for weights`` measures it. One safetensors file for a transformer has, by the
name of the layer, its inputs' largest principal directions [R, K] in float8_e4m3fn, as
:func:`sagewan.checkpoint.compensate.compensated` takes them. It lies in a folder ``inputs`` beside
the transformer, or among our caches. Only reading and writing it needs torch.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sagewan.cache import cache_folder, write_whole
from sagewan.checkpoint.containers import open_file
from sagewan.errors import CheckpointError
from sagewan.plan.layers import Role, role_of

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "inputs"
# Layers that have the input of another one.
_SHARED = {"attn1.to_k": "attn1.to_q", "attn1.to_v": "attn1.to_q"}


def find_calibration(transformer: Path) -> Path | None:
    """Where the measurements of a transformer, the file or folder of its weights, are; None if it
    was not measured. What was measured here comes before what came with the weights."""
    # Of a folder's name what follows a point is no ending: wan2.1-t2v.
    name = transformer.stem if transformer.is_file() else transformer.name
    beside = transformer.parent / FOLDER / f"{name}.safetensors"
    places = (place_of(transformer), beside)
    return next((path for path in places if path.is_file()), None)


def place_of(transformer: Path) -> Path:
    """Where what is measured of a transformer is kept."""
    digest = hashlib.sha256(str(transformer.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / FOLDER / f"{digest}.safetensors"


def measured_layer(layer: str) -> str | None:
    """The layer, by its name in the transformer, whose measured inputs are those of this one; None
    if they are not measured: of the text there are too few tokens to tell how others will lie."""
    if role_of(layer) in (Role.CROSS_KEY_VALUE, Role.OTHER, Role.TIME):
        return None
    for own, other in _SHARED.items():
        if layer.endswith(f".{own}"):
            return layer.removesuffix(own) + other
    return layer


def by_layer(path: Path | None) -> "Callable[[str, int], Tensor | None]":
    """What tells, by a layer's name and how many inputs it has, the directions [R, K] in which they
    lie; None for a layer that was not measured, and for all without a file.

    Raises CheckpointError for a file that is damaged, and so does what it gives, for one of another
    model.
    """
    measured = _read(path) if path else {}

    def directions(layer: str, inputs: int) -> "Tensor | None":
        found = measured.get(measured_layer(layer) or "")
        if found is not None and found.shape[1] != inputs:
            raise CheckpointError(
                f"{path}: {layer} has {inputs} inputs, and {found.shape[1]} were measured: remove "
                "the file, and run sagewan calibrate --for weights"
            )
        return found

    return directions


def _read(path: Path) -> "dict[str, Tensor]":
    found = {name: stored.tensor() for name, stored in open_file(path).tensors.items()}
    for name, directions in found.items():
        if directions.dim() != 2 or not directions.float().isfinite().all():
            raise CheckpointError(
                f"{path}: {name} is no measurement of inputs: remove the file, and run "
                "sagewan calibrate --for weights"
            )
    return found


def write_calibration(path: Path, measured: "Mapping[str, Tensor]") -> None:
    """Keep directions [R, K] by layer, all of one measurement. Raises OSError; then what was there
    before is there."""
    import torch
    from safetensors.torch import save

    # Each as long as the root of its share, with numbers up to about the root of K: in range.
    eight = {
        name: x.clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()
        for name, x in measured.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(eight))
