"""The one place where a kernel is launched, and what every launcher checks first."""

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sagewan.errors import ShapeError

MAX_HEAD_DIM = 256
# Arguments that differ from call to call and speed nothing up when known: a kernel is not compiled
# anew for lengths that happen to be multiples of 16.
VARYING = ("heads", "shared", "count", "keys", "block_b", "block_h")
# Triton decides at the import of a kernel.
_INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a block runs: its warps, the stages of its software pipeline, and the most registers a
    thread may take, where that lets another block share the multiprocessor."""

    warps: int
    stages: int = 1
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tile(Schedule):
    """How an attention kernel is cut: a block's query rows, and the keys of each of its steps.
    ``tma``: tiles of K and V are copied by the tensor memory accelerator. ``ahead``: the biases of
    the next step's keys are read a step early, where registers suffice."""

    block_m: int
    block_n: int
    tma: bool = False
    ahead: bool = True


def is_copyable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can copy tiles of x: its last dimension must be
    contiguous, the others begin at multiples of 16 bytes and not repeat."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and not x.data_ptr() % 16 and all(s and not s % 16 for s in steps)


def copied(x: Tensor, tile: tuple[int, ...]) -> TensorDescriptor | None:
    """x as the tensor memory accelerator copies tiles of it, or None if it can't."""
    if not is_copyable(x):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(tile))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: Mapping[str, object],
    schedule: Schedule,
) -> Any:
    """Run ``kernel`` once for each place of ``grid`` on the device that holds its tensors → the
    compiled kernel, None under the interpreter."""
    # Triton launches on the current device, whatever the tensors' own is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return kernel[grid](
            **arguments,
            num_warps=schedule.warps,
            num_stages=schedule.stages,
            maxnreg=schedule.registers,
        )


class Repeated:
    """:func:`launch` of one kernel that runs for less time than Triton takes to look up what it
    compiled: what the first launch of a kind gave is kept, and called from then on.

    ``kind`` is whatever the compiled program follows from: dtypes, shapes, constants; by default
    all the numbers and dtypes among the arguments. These come in the order of the kernel's own.
    """

    def __init__(self, kernel: Any, schedule: Schedule) -> None:
        self._kernel = kernel
        self._schedule = schedule
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        kind: Hashable | None,
        grid: tuple[int, int, int],
        device: torch.device,
        arguments: Mapping[str, object],
    ) -> None:
        if kind is None:
            kind = tuple(x.dtype if isinstance(x, Tensor) else x for x in arguments.values())
        addresses = 0
        for x in arguments.values():
            if isinstance(x, Tensor):
                addresses |= x.data_ptr()
        # A program that reads 16 bytes at once was compiled for addresses that allow it.
        aligned = addresses % 16 == 0
        key = kind, device
        compiled = self._compiled.get(key) if aligned else None
        if compiled is None or device.index != torch.cuda.current_device():
            compiled = launch(self._kernel, grid, device, arguments, self._schedule)
            if aligned and compiled is not None:
                self._compiled[key] = compiled
        else:
            compiled[grid](*arguments.values())


def strided(name: str, x: Tensor) -> dict[str, object]:
    """A tensor [B, H, N, D] and its strides, as the kernels call them."""
    names = (name, *(f"{name}_{axis}" for axis in "bhnd"))
    return dict(zip(names, (x, *x.stride()), strict=True))


@cache
def compute_capability(device: torch.device) -> int:
    """90 for compute capability 9.0; the interpreter on a CPU takes the oldest's configurations."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def block_of(head_dim: int) -> int:
    """The head size inside a kernel: a power of two, and at least INT8's smallest product."""
    return max(32, int(triton.next_power_of_2(head_dim)))


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShapeError, with the fix, for tensors that the kernels do not take.

    They take q [B, H, N, D], k and v [B, Hk, M, D] of one 16-bit dtype on one device, with H a
    multiple of Hk, D a multiple of 8 up to 256, N and M at least 1, and no gradient.
    """
    _check_shapes(q, k, v)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ShapeError(f"q, k and v are {found}: give all three as bfloat16 or as float16")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v are on {q.device}, {k.device}, {v.device}: give one device")
    if q.device.type == "cpu" and not _INTERPRETED:
        raise ShapeError("q, k and v are on the CPU: these kernels need an NVIDIA GPU")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ShapeError("q, k or v wants a gradient, which low precision has not: use no_grad()")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    # Sentences are made where they are needed: a compiled program has no numbers for its shapes.
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ShapeError(f"{_shapes(q, k, v)}: give [batch, heads, tokens, size]")
    batch, heads, _, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size:
        raise ShapeError(f"{_shapes(q, k, v)}, which do not fit together")
    if min(*q.shape, *k.shape) < 1:
        raise ShapeError(f"{_shapes(q, k, v)}: none may be empty")
    if heads % k.shape[1]:
        raise ShapeError(f"{heads} query heads can't share {k.shape[1]} key heads evenly")
    if size % 8 or size > MAX_HEAD_DIM:
        raise ShapeError(f"head size {size}: give a multiple of 8 up to {MAX_HEAD_DIM}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return "q, k and v have the shapes " + ", ".join(str(list(x.shape)) for x in (q, k, v))
