"""The header of a safetensors file: 8 bytes with its length (little endian), then JSON that gives
each tensor's dtype, shape and place (github.com/huggingface/safetensors, "Format")."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagewan.checkpoint.tensors import (
    ITEM_BYTES,
    Stored,
    TensorFile,
    check_name,
    check_places,
    told,
)
from sagewan.errors import CheckpointError

# The format's own limit on its header, in bytes.
_MAX_HEADER = 100_000_000

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class _Repeated(ValueError):
    """A key that stands twice in one JSON object; of two tensors one would be lost."""


def read_safetensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file, each of which is known to lie whole in the file.

    Raises CheckpointError if the file is something else, is damaged or ends early.
    """
    text, begin = _header(path)
    try:
        found = json.loads(text, object_pairs_hook=_unrepeated)
    except _Repeated as error:
        raise CheckpointError(
            f"{path}: {told(str(error))} stands twice in the header, so the file is damaged: "
            "fetch it again"
        ) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a safetensors file, or is cut short: fetch it again")
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has a broken header: its metadata is no list of texts")
    file = TensorFile(path, "safetensors", metadata)
    for name, place in found.items():
        check_name(name, path)
        file.tensors[name] = _stored(file, name, place, begin)
    check_places(file, begin)
    _refuse_excess(file, begin)
    return file


def _header(path: Path) -> tuple[bytes, int]:
    """The header's JSON, and where the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = b"" if length > _MAX_HEADER else file.read(length)
    if length > _MAX_HEADER or not text.lstrip().startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file, or is cut short: fetch it again")
    if len(text) < length:
        raise CheckpointError(
            f"{path} is cut short: its header of {length} bytes is longer than the file; "
            "fetch it again"
        )
    return text, 8 + length


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return found


def _stored(file: TensorFile, name: str, place: object, begin: int) -> Stored:
    if not isinstance(place, Mapping):
        raise CheckpointError(f"{file.path} has a broken header ({name}): fetch it again")
    dtype = place.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{file.path}: {name} has the number format {told(dtype)}, which this version does not "
            "read: update sagewan, or choose another file"
        )
    shape, offsets = _counts(place.get("shape")), _counts(place.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{file.path} has a broken header ({name}): fetch it again")
    nbytes = math.prod(shape) * ITEM_BYTES[_DTYPES[dtype]]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{file.path} has a broken header: {name} has {nbytes} bytes by its shape and "
            f"{offsets[1] - offsets[0]} by its place; fetch it again"
        )
    return Stored(
        name=name,
        dtype=_DTYPES[dtype],
        shape=tuple(shape),
        nbytes=nbytes,
        offset=begin + offsets[0],
        file=file,
    )


def _counts(values: Any) -> list[int] | None:
    if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values):
        return values
    return None


def _refuse_excess(file: TensorFile, begin: int) -> None:
    """The format has no room between tensors or behind them."""
    expected = begin + sum(stored.nbytes for stored in file.tensors.values())
    actual = file.path.stat().st_size
    if actual != expected:
        raise CheckpointError(
            f"{file.path} has {actual} bytes and its tensors take {expected}, so the file is "
            "damaged: fetch it again"
        )
