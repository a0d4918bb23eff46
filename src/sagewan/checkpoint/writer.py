"""A safetensors file written tensor by tensor, and taken up again where it was broken off.

All names, dtypes and shapes are known beforehand, so the header comes first, and what is there of
the data tells how far an earlier attempt came. The file has its name only when it is whole.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sagewan.checkpoint.tensors import ITEM_BYTES

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
PARTIAL = ".partial"


@dataclass(frozen=True)
class Slot:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[str(self.dtype).removeprefix("torch.")]


class Writer:
    """Writes ``slots`` in their order to ``path``, beside it until it is whole.

    ``done`` is how many an earlier attempt with the same header left there; the next
    :meth:`append` is for the slot after them.
    """

    def __init__(self, path: Path, slots: Sequence[Slot], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.slots = tuple(slots)
        self.partial = path.with_name(path.name + PARTIAL)
        header = _header(slots, metadata)
        begin = len(header)
        self.done = 0
        mode = "r+b" if self._is_ours(header) else "w+b"
        self._file = self.partial.open(mode)
        if mode == "w+b":
            self._file.write(header)
        size = self.partial.stat().st_size if mode == "r+b" else begin
        end = begin
        for slot in self.slots:
            if end + slot.nbytes > size:
                break
            end += slot.nbytes
            self.done += 1
        # Half a tensor is written again.
        self._file.truncate(end)
        self._file.seek(end)

    def _is_ours(self, header: bytes) -> bool:
        if not self.partial.exists():
            return False
        with self.partial.open("rb") as file:
            return file.read(len(header)) == header

    def append(self, tensor: Tensor) -> None:
        """Write the next tensor, which is on the CPU."""
        slot = self.slots[self.done]
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
            raise ValueError(f"{slot.name} is {tensor.dtype} {list(tensor.shape)}, not {slot}")
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.done += 1

    def finish(self) -> None:
        """Give the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.partial.replace(self.path)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    places: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for slot in slots:
        begin, end = end, end + slot.nbytes
        places[slot.name] = {
            "dtype": _NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
