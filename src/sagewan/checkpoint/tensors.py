"""Files of tensors: what each holds and where, and its bytes mapped into memory when asked for.

Only :meth:`TensorFile.tensor` needs torch.
"""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_WINDOW = 1 << 30
_MAX_NAME = 300
_TOLD = 80

# Bytes of one element, by torch's names.
ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as its file has it. ``dtype`` is torch's name, or GGUF's such as ``gguf:Q8_0``,
    whose ``shape`` is that of the numbers it packs; ``offset`` counts bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: "TensorFile" = field(repr=False, compare=False)

    def head(self, count: int | None = None) -> bytes:
        """Its first ``count`` bytes, or all."""
        return self.file.head(self, self.nbytes if count is None else min(count, self.nbytes))

    def tensor(self) -> "torch.Tensor":
        """The tensor on the CPU, still in the file's pages where it can be; a packed GGUF tensor
        comes as uint8 [rows, bytes of a row]."""
        return self.file.tensor(self)


@dataclass(eq=False)
class TensorFile:
    """An open file of tensors, ``tensors`` by name. ``metadata`` is what its header says beside
    them. :func:`.containers.open_file` makes it; it is not to be changed while it is in use."""

    path: Path
    container: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    _mapped: dict[int, mmap.mmap] = field(default_factory=dict, init=False, repr=False)

    def head(self, stored: Stored, count: int) -> bytes:
        return self._map[stored.offset : stored.offset + count]

    def tensor(self, stored: Stored) -> "torch.Tensor":
        import torch

        packed = stored.dtype.startswith("gguf:")
        dtype = torch.uint8 if packed else getattr(torch, stored.dtype)
        shape = (*stored.shape[:-1], -1) if packed else stored.shape
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=dtype)
        window, begin = self._window(stored)
        data = torch.frombuffer(
            window, dtype=torch.uint8, count=stored.nbytes, offset=stored.offset - begin
        )
        if stored.offset % dtype.itemsize:
            data = data.clone()  # torch views no numbers that begin at an odd address
        viewed: torch.Tensor = data.view(dtype).view(shape)
        return viewed

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _window(self, stored: Stored) -> tuple[mmap.mmap, int]:
        """The mapped part of the file that a tensor lies in, and where that part begins."""
        begin, end = self._windows[stored.offset]
        if begin not in self._mapped:
            with self.path.open("rb") as file:
                # Private pages: nothing that is done to a tensor reaches the file.
                self._mapped[begin] = mmap.mmap(
                    file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin
                )
        return self._mapped[begin], begin

    @cached_property
    def _windows(self) -> dict[int, tuple[int, int]]:
        """Offset of each tensor → begin and end of its window. A file is mapped in parts of about
        1 GiB: private pages of a whole file that is larger than memory would be refused, and each
        tensor by itself would take a file handle of its own."""
        found: dict[int, tuple[int, int]] = {}
        group: list[Stored] = []
        stored_by_place = sorted(self.tensors.values(), key=lambda stored: stored.offset)
        for number, stored in enumerate(stored_by_place):
            group.append(stored)
            end = stored.offset + stored.nbytes
            begin = group[0].offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            if end - begin >= _WINDOW or number == len(stored_by_place) - 1:
                found |= dict.fromkeys((one.offset for one in group if one.nbytes), (begin, end))
                group = []
        return found


def all_tensors(files: Iterator[TensorFile] | list[TensorFile]) -> dict[str, Stored]:
    """The tensors of several files together; CheckpointError if two hold the same one."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in file.tensors.items():
            if name in found:
                raise CheckpointError(
                    f"{name} is both in {found[name].file.path} and in {file.path}: "
                    "keep the files of one model in a folder of their own"
                )
            found[name] = stored
    return found


def told(value: object) -> str:
    """Whatever a file holds, as a sentence can: on one line, and not long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _TOLD else text[:_TOLD] + "…"


def check_name(name: str, path: Path) -> str:
    """The name of a tensor; CheckpointError if it is none that a person or a program would give."""
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise CheckpointError(
            f"{path} has a broken header: it names a tensor {told(name)}; fetch it again"
        )
    return name


def check_places(file: TensorFile, begin: int, what: str = "its download is not complete") -> None:
    """CheckpointError unless the tensors lie in the file from ``begin`` on, none over another."""
    size = file.path.stat().st_size
    end, last = begin, ""
    for stored in sorted(file.tensors.values(), key=lambda stored: stored.offset):
        if stored.nbytes and stored.offset < end:
            raise CheckpointError(
                f"{file.path}: {stored.name} overlaps "
                f"{last or 'the header'}, so the file is damaged: fetch it again"
            )
        if stored.nbytes:
            end, last = stored.offset + stored.nbytes, stored.name
    if end > size:
        raise CheckpointError(f"{file.path} has {size} of {end} bytes: {what}; fetch it again")
