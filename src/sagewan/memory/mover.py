"""Copies to a device beside its computing, and the marks that order the two.

One protocol, so that the order of copies, waits and releases is the same on a GPU, on a CPU, and
in a test that runs the copies as late, or as early, as the marks allow.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sagewan.memory.pinned import CudaRegister, NoRegister, Register
from sagewan.memory.upload import upload

# A point in a stream's work: an event on a GPU. None is a point already reached.
Mark = Any


class Mover(Protocol):
    """Two streams of work, computing (the caller's) and copying (our own), and memory for both."""

    register: Register

    def empty(self, nbytes: int) -> Tensor:
        """A uint8 buffer on the device."""

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors on the device, made in the computing's order."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy in the order of the copying; returns before it is done."""

    def copied(self) -> Mark:
        """The point at which all copies so far are done."""

    def computed(self) -> Mark:
        """The point at which all computing so far is done."""

    def compute_waits(self, mark: Mark) -> None:
        """What is computed from here on comes after the mark."""

    def copy_waits(self, mark: Mark) -> None:
        """What is copied from here on comes after the mark."""

    def host_waits(self, mark: Mark) -> None:
        """Return when the mark is reached."""


class CudaMover:
    """A second stream of a GPU, so that copies pass while the GPU computes."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self.register: Register = CudaRegister()

    def empty(self, nbytes: int) -> Tensor:
        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return upload(tensors, str(self._device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Mark:
        return self._stream.record_event()

    def computed(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def compute_waits(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def copy_waits(self, mark: Mark) -> None:
        if mark is not None:
            self._stream.wait_event(mark)

    def host_waits(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()


class DirectMover:
    """A CPU: everything happens at once and in order, so no mark is ever waited for."""

    register: Register = NoRegister()

    def empty(self, nbytes: int) -> Tensor:
        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8)

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def copied(self) -> Mark:
        return None

    def computed(self) -> Mark:
        return None

    def compute_waits(self, mark: Mark) -> None:
        pass

    def copy_waits(self, mark: Mark) -> None:
        pass

    def host_waits(self, mark: Mark) -> None:
        pass


def mover_for(device: str) -> Mover:
    """The mover of a device, by torch's name of it."""
    return DirectMover() if device == "cpu" else CudaMover(device)
