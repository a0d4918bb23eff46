"""Page-locked host memory of exact sizes, within a budget.

torch's own pinned allocator rounds up to powers of two, so that 9 GiB take 16, and keeps what is
given back. Here pages are mapped, registered with CUDA as they are, and unmapped again.
"""

import logging
import mmap
from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Register(Protocol):
    """Page-locks memory, and undoes it; the error in words where the system refuses."""

    def lock(self, address: int, nbytes: int) -> str | None: ...

    def unlock(self, address: int) -> None: ...


class CudaRegister:
    """cudaHostRegister and cudaHostUnregister."""

    def lock(self, address: int, nbytes: int) -> str | None:
        error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
        if int(error) == 0:
            return None
        # CUDA hands the error out once more, to whoever launches next: let it be this one.
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError as again:
            logger.debug("after cudaHostRegister: %s", again)
        return f"CUDA error {int(error)}"

    def unlock(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


class NoRegister:
    """For a device that reads host memory as it is: locking would gain nothing."""

    def lock(self, address: int, nbytes: int) -> str | None:  # noqa: ARG002
        return None

    def unlock(self, address: int) -> None:
        pass


class PinnedMemory:
    """Buffers of page-locked memory, no more than ``budget`` bytes in all.

    ``used`` is what is locked now. Once the system has refused, ``refusal`` says so in words and
    nothing more is asked of it. Thread-safe where each buffer is asked for and freed by one owner.
    """

    def __init__(self, budget: int, register: Register) -> None:
        self.budget = budget
        self.used = 0
        self.refusal: str | None = None
        self._register = register
        self._locked: dict[int, int] = {}

    def allocate(self, nbytes: int) -> Tensor | None:
        """A uint8 buffer of this size; None where it is beyond the budget or was refused."""
        if self.refusal or nbytes == 0 or self.used + nbytes > self.budget:
            return None
        try:
            buffer = _mapped(nbytes)
        except OSError as error:
            self._note_refusal(nbytes, str(error))
            return None
        address = buffer.data_ptr()
        problem = self._register.lock(address, nbytes)
        if problem:
            self._note_refusal(nbytes, problem)
            return None
        self._locked[address] = nbytes
        self.used += nbytes
        return buffer

    def free(self, buffer: Tensor) -> None:
        """Give one buffer back; its pages are unmapped once no tensor is left in them."""
        address = buffer.data_ptr()
        self.used -= self._locked.pop(address)
        self._register.unlock(address)

    def close(self) -> None:
        """Give all buffers back."""
        for address, nbytes in self._locked.items():
            self._register.unlock(address)
            self.used -= nbytes
        self._locked.clear()

    def _note_refusal(self, nbytes: int, problem: str) -> None:
        self.refusal = (
            f"the system did not let {nbytes / 2**30:.2f} GiB of host memory be pinned beside "
            f"{self.used / 2**30:.2f} GiB ({problem}); the rest is copied from ordinary memory, "
            "which is slower"
        )


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in pinned memory of torch's, which is kept for the next one. Raises
    MemoryError: CUDA's own error does not say whose memory was not enough."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        nbytes = prod(shape) * dtype.itemsize
        raise MemoryError(
            f"{nbytes / 2**30:.2f} GiB of pinned host memory were refused ({error})"
        ) from error


def _mapped(nbytes: int) -> Tensor:
    """A uint8 tensor in pages of its own, unmapped with the last tensor in them."""
    with torch.inference_mode(mode=False):
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
