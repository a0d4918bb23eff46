"""The header of a GGUF file: what it says of itself, and each tensor's type, shape and place
(github.com/ggml-org/ggml, docs/gguf.md; versions 2 and 3, little endian)."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from sagewan.checkpoint.tensors import Stored, TensorFile, check_name, check_places, told
from sagewan.errors import CheckpointError

# Number → name, numbers in a block, bytes of a block; those the program unpacks.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}
_PLAIN = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
# A header is some megabytes at most, nearly all of it a tokenizer's words.
_MAX_HEADER = 256 << 20
_MAX_COUNT = 10_000_000
# Files that ComfyUI's converter made of tensors with more sides than GGUF has; else Wan's.
_SHAPES = "comfy.gguf.orig_shape."
_ARCHITECTURES = ("wan", "t5", "t5encoder", "umt5", "clip", "pig", "")

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def read_gguf(path: Path) -> TensorFile:
    """The tensors of a GGUF file, each of which is known to lie whole in the file.

    A packed type's dtype is ``gguf:`` and its name. Raises CheckpointError if the file is damaged,
    ends early, is of another architecture, or has types that are not read.
    """
    with path.open("rb") as opened:
        reader = _Reader(path, opened.read(_MAX_HEADER))
    if reader.read("I") != int.from_bytes(b"GGUF", "little") or (version := reader.read("I")) > 3:
        raise CheckpointError(f"{path} is a GGUF file of a version that is not read: fetch another")
    if version < 2:
        raise CheckpointError(
            f"{path} is a GGUF file of version 1: convert it again, or fetch another"
        )
    count, pairs = reader.count("Q"), reader.count("Q")
    metadata = {}
    for _ in range(pairs):
        key = reader.text()
        metadata[key] = reader.value(int(reader.read("I")))
    _check_architecture(metadata, path)
    file = TensorFile(path, "gguf", metadata)
    described = [reader.tensor() for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise CheckpointError(f"{path}: its alignment is {told(alignment)}: fetch it again")
    begin = -(-reader.at // alignment) * alignment
    for name, kind, sides, offset in described:
        if check_name(name, path) in file.tensors:
            raise CheckpointError(f"{path} holds {name} twice, so it is damaged: fetch it again")
        file.tensors[name] = _stored(file, name, kind, sides, begin + offset)
    check_places(file, begin)
    return file


def _stored(file: TensorFile, name: str, kind: int, sides: list[int], offset: int) -> Stored:
    if kind not in TYPES:
        raise CheckpointError(
            f"{file.path}: {name} has GGUF's type {kind}, which this version does not read: choose "
            f"a file in {', '.join(name for name, block, _ in TYPES.values() if block > 1)}"
        )
    type_name, block, block_bytes = TYPES[kind]
    # GGUF counts sides from the innermost.
    shape = tuple(reversed(sides))
    if (shape[-1] if shape else 1) % block:
        raise CheckpointError(
            f"{file.path}: the rows of {name} have {shape[-1]} numbers, no multiple of the {block} "
            f"that {type_name} packs together: the file is damaged; fetch it again"
        )
    elements = math.prod(shape)
    return Stored(
        name=name,
        dtype=_PLAIN.get(type_name, f"gguf:{type_name}"),
        shape=_original_shape(file, name, shape),
        nbytes=elements // block * block_bytes,
        offset=offset,
        file=file,
    )


def _original_shape(file: TensorFile, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    original = file.metadata.get(_SHAPES + name)
    if original is None:
        return shape
    if not isinstance(original, list) or not all(type(side) is int for side in original):
        raise CheckpointError(f"{file.path}: {_SHAPES}{name} is no shape: fetch it again")
    if math.prod(original) != math.prod(shape):
        raise CheckpointError(
            f"{file.path}: {name} has the shape {list(shape)} and is said to be {told(original)}: "
            "the file is damaged; fetch it again"
        )
    return tuple(original)


def _check_architecture(metadata: Mapping[str, Any], path: Path) -> None:
    architecture = metadata.get("general.architecture", "")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path} is a GGUF file of the architecture {told(architecture)}, not of Wan: choose a "
            "Wan model"
        )


class _Reader:
    """The header's bytes, read from the front; every number is checked before it is believed."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data = path, data
        self.at = 0

    def read(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        value: int | float | bool = struct.unpack("<" + code, self._take(size))[0]
        return value

    def count(self, code: str) -> int:
        number = int(self.read(code))
        if number > _MAX_COUNT:
            self._damaged()
        return number

    def text(self) -> str:
        try:
            return self._take(self.count("Q")).decode("utf-8")
        except UnicodeDecodeError:
            self._damaged()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.read(_SCALARS[kind])
        if kind != _ARRAY or depth > 2:
            self._damaged()
        inner, count = int(self.read("I")), self.count("Q")
        if inner in _SCALARS:
            code = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack(code, self._take(struct.calcsize(code))))
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor(self) -> tuple[str, int, list[int], int]:
        """Name, type, sides from the innermost, and offset behind the header."""
        name, dimensions = self.text(), int(self.read("I"))
        if dimensions > 8:
            self._damaged()
        sides = [int(self.read("Q")) for _ in range(dimensions)]
        return name, int(self.read("I")), sides, int(self.read("Q"))

    def _take(self, size: int) -> bytes:
        if self.at + size > len(self._data):
            self._damaged()
        self.at += size
        return self._data[self.at - size : self.at]

    def _damaged(self) -> NoReturn:
        raise CheckpointError(
            f"{self._path} is a damaged GGUF file, or is cut short: fetch it again"
        )
