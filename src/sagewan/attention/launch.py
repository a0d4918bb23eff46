"""Calls the function of a row with the arguments it takes, and counts what truly ran."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sagewan.attention.resolve import Function, ImplementationError, load, name_of, one_line
from sagewan.kernels.prepared import Prepared
from sagewan.plan.attention import Choice
from sagewan.plan.catalogue import Implementation
from sagewan.plan.objection import Objection
from sagewan.plan.row import Row
from sagewan.reference.attention import log_sum_exp

_BACKENDS = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.MATH.value: "math",
}


# torch has a class for one of the ways in which memory runs out; these messages tell the others.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "Triton Error [CUDA]: out of memory",
)


class Launcher:
    """Runs the choices of a plan, and keeps the count that the report shows.

    The count is by the function object that was called, not by the name that was asked for.
    """

    def __init__(self) -> None:
        self._functions: dict[str, Function] = {}
        self._calls: Counter[tuple[str, str, str | None]] = Counter()
        self._masked = 0
        self._backends: dict[tuple[object, ...], str] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: Choice,
        *,
        scale: float | None = None,
        block_mask: Tensor | None = None,
    ) -> Tensor:
        """q [B, H, N, D], k and v [B, Hk, M, D], any strides → [B, H, N, D] in q's dtype.

        ``block_mask`` [B or 1, H or 1, ⌈N/128⌉, ⌈M/128⌉] bool is true for the blocks to attend to;
        the row must take it. Raises ImplementationError if the row can't be loaded or fails, and
        running out of memory as it comes. Inputs are not changed.
        """
        return self._run(choice.row, (q, k, v), scale, with_lse=False, block_mask=block_mask)[0]

    def attend_prepared(
        self,
        prepared: Prepared[Any, Any],
        out: Tensor,
        choice: Choice,
        *,
        block_mask: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`attend`, by the second half of the row's function alone: Q, K and V are
        prepared already, for it. Written to out [B, H, N, D], any strides."""
        row = choice.row
        # Both halves are of one module.
        half = replace(row, call=f"{row.call.partition(':')[0]}:attend")
        function = self._functions.get(half.call) or load(half)
        self._functions[half.call] = function
        try:
            with torch.cuda.device_of(out):
                function(prepared, block_mask=block_mask, out=out)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise failed(row, error) from error
        self._masked += block_mask is not None
        self._calls[row.mode, name_of(function, half), None] += 1
        return out

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, choice: Choice, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`attend`, with the natural log-sum-exp of each row, [B, H, N] float32."""
        output, lse = self._run(choice.row, (q, k, v), scale, with_lse=True)
        return output, log_sum_exp(q, k, scale=scale, dtype=torch.float32) if lse is None else lse

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Count the calls within the block only if no row fails in it and memory suffices: what is
        broken off so is done again, and then counted."""
        before = self._calls.copy(), self._masked
        try:
            yield
        except (ImplementationError, RuntimeError, MemoryError):
            self._calls, self._masked = before
            raise

    def ran(self) -> list[dict[str, object]]:
        """What was called and how often, for the report, the most frequent first."""
        return [
            {"mode": mode, "implementation": name, "torch_backend": backend, "calls": calls}
            for (mode, name, backend), calls in self._calls.most_common()
        ]

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return self._calls.total()

    @property
    def masked_calls(self) -> int:
        """How many of them left out blocks of keys."""
        return self._masked

    def _run(
        self,
        row: Implementation,
        inputs: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        *,
        with_lse: bool,
        block_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        function = self._functions.get(row.name) or load(row)
        self._functions[row.name] = function
        result = call(function, row, *inputs, scale=scale, with_lse=with_lse, block_mask=block_mask)
        backend = self._backend(*inputs) if _is_torch(function) else None
        self._masked += block_mask is not None
        self._calls[row.mode, name_of(function, row), backend] += 1
        return result

    def _backend(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        key = (*(_signature(x) for x in (q, k, v)), *_enabled())
        if key not in self._backends:
            self._backends[key] = torch_backend(q, k, v)
        return self._backends[key]


def call(
    function: Function,
    row: Implementation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    with_lse: bool = False,
    block_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One call of a row's function: → output [B, H, N, D] and, if it gives it, [B, H, N].

    A mask of blocks is for rows that take one. Raises ImplementationError for whatever the function
    raises, but for running out of memory.
    """
    options: dict[str, Any] = dict(row.options)
    if with_lse and row.lse_option:
        options[row.lse_option] = True
    if block_mask is not None:
        if row.block_mask is None:
            raise ImplementationError(row, Objection("block-mask"))
        options[row.block_mask] = block_mask
    if row.grouped_option and k.shape[1] != q.shape[1]:
        options[row.grouped_option] = True
    if scale is not None and row.scale:
        options[row.scale] = scale
    elif scale is not None:
        # The function divides by √D and takes no other scale: q carries the difference.
        q = q * (scale * math.sqrt(q.shape[-1]))
    shape, dtype = q.shape, q.dtype
    try:
        # Triton launches on the current device, which need not be the tensors' own.
        with torch.cuda.device_of(q):
            result = function(*(_arranged(x, row) for x in (q, _own_key(k, row), v)), **options)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise failed(row, error) from error
    output, lse = result[:2] if isinstance(result, tuple) else (result, None)
    output = output.transpose(1, 2) if row.layout == "BNHD" else output
    if output.shape != shape:
        found = f"it returned the shape {tuple(output.shape)} for {tuple(shape)}"
        raise ImplementationError(row, Objection("run-failed", {"error": found}))
    return output.to(dtype), lse if with_lse and row.lse_option else None


def failed(row: Row, error: Exception) -> ImplementationError:
    """What a row's function raised, as what is known of the row."""
    return ImplementationError(row, Objection("run-failed", {"error": one_line(error)}))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, the device's or the machine's, did not suffice: no fault of what ran."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in _OUT_OF_MEMORY)


def torch_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which of torch's own kernels scaled_dot_product_attention takes for these tensors.

    Asks the function that it asks itself; ``flash``, ``cudnn``, ``efficient`` or ``math``.
    """
    choice = torch._fused_sdp_choice(q, k, v, enable_gqa=k.shape[1] != q.shape[1])  # noqa: SLF001
    return _BACKENDS.get(int(choice), str(choice))


def _arranged(x: Tensor, row: Implementation) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.transpose(1, 2) if row.layout == "BNHD" else x


def _own_key(k: Tensor, row: Implementation) -> Tensor:
    return k.clone() if row.changes_key else k


def _is_torch(function: Function) -> bool:
    return function is torch.nn.functional.scaled_dot_product_attention


def _signature(x: Tensor) -> tuple[object, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad


def _enabled() -> tuple[bool, ...]:
    """The switches by which a program forbids torch some of its kernels."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
