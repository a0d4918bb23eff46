"""Attention with INT8 Q·Kᵀ on Hopper (compute capability 9.0), in CUDA C++ compiled by NVRTC.

The kernel is ``hopper_attention.cu``; this module prepares Q, K and V for it and launches it.
:func:`sageattn` smooths K; :func:`sageattn_3` smooths Q and K, rotates both and rounds keys with
little error along themselves; :func:`sageattn_3_fp8` does without the latter and multiplies P·V in
FP8. 64 rows of Q, and 64 or 128 keys, share a scale, because the kernel keeps scores as integers
until the exponential. Head sizes from 72 to 128, padded; no causal order, no dropout, no gradient.
After FlashAttention-3 (arXiv:2407.08608) and SageAttention2 (arXiv:2411.10958).
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.fp8_attention import E4M3_MAX
from sagewan.kernels.int8_attention import lists, outputs
from sagewan.kernels.launch import block_of, check, is_copyable
from sagewan.kernels.nvrtc import Kernel, tensor_map
from sagewan.kernels.operators import operator
from sagewan.kernels.prepare import e4m3_columns
from sagewan.kernels.prepared import Columns, Prepared, Rows
from sagewan.kernels.query_key import Grain, check_grain, plain, smoothed, whole

SOURCE = "hopper_attention.cu"
# The head size inside the kernel.
CHANNELS = 128
_KEYS, _WARPGROUPS = 128, 2
# In FP8 all the keys of a step share a scale, so that there is less to do in it.
_GRAIN, _GRAIN_FP8 = Grain(), Grain(keys=_KEYS)
_ROWS = 64 * _WARPGROUPS

_THREADS = 128 * (_WARPGROUPS + 1)
_V_FORMATS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float16: 2}


def _aligned(size: int) -> int:
    """Tiles that are swizzled begin at multiples of 1024 bytes."""
    return -(-size // 1024) * 1024


@dataclass(frozen=True)
class Form:
    """One form of the kernel: V's format, and how many keys share a scale."""

    v_dtype: torch.dtype
    keys_per_scale: int = _GRAIN.keys

    @property
    def stages(self) -> int:
        return 3 if self.v_dtype.itemsize == 2 else 4

    @property
    def shared_bytes(self) -> int:
        """The kernel's ``Shared``: its tiles, where scores start, and barriers."""
        tile = _KEYS * CHANNELS
        ones = 8 * _KEYS if self.v_dtype.itemsize == 1 else 0
        v_tile = tile * self.v_dtype.itemsize + ones
        worth = 16 * _KEYS // self.keys_per_scale
        stage = _aligned(tile + v_tile + _WARPGROUPS * (_KEYS * 8 + worth) + 2 * 8)
        return _aligned(_ROWS * CHANNELS + self.stages * stage + 8)

    def defines(self) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {
            "V_FORMAT": _V_FORMATS[self.v_dtype],
            "WARPGROUPS": _WARPGROUPS,
            "STAGES": self.stages,
            "KEYS_PER_SCALE": self.keys_per_scale,
            "SHARED_BYTES": self.shared_bytes,
        }


@cache
def _kernel(device: int, form: Form) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(SOURCE, "attention", "sm_90a", form.defines(), shared_bytes=form.shared_bytes)


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, H, N, D], k and v [B, Hk, M, D], bf16 or fp16, any strides → [B, H, N, D].

    ``scale`` defaults to D**-0.5; ``return_lse`` adds the natural log-sum-exp [B, H, N] float32;
    ``block_mask`` is as :func:`attend`'s. Raises ShapeError for what
    :func:`sagewan.kernels.launch.check` refuses, and for other heads than those of 72 to 128
    channels.
    """
    return _sageattn(q, k, v, scale, return_lse, block_mask)


def sageattn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`sageattn`, with Q smoothed too, both rotated, and keys rounded so that their error
    has little along themselves."""
    return _sageattn_3(q, k, v, scale, return_lse, block_mask)


def sageattn_3_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`sageattn_3`, but for how keys are rounded, and P·V in FP8."""
    return _sageattn_3_fp8(q, k, v, scale, return_lse, block_mask)


def prepare_sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> Prepared[Rows, Tensor]:
    """The first half of :func:`sageattn`; arguments as
    :func:`sagewan.kernels.int8_attention.prepare_sageattn`'s. V is copied if its channels are
    not adjacent in memory, its rows do not begin at multiples of 16 bytes, or one is repeated."""
    _check(q, k, v)
    rows = plain(q, k, scale, _GRAIN, k_mean=k_mean, with_lse=with_lse)
    return whole(q, k, rows, _copyable(v))


def prepare_sageattn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> Prepared[Rows, Tensor]:
    """The first half of :func:`sageattn_3`; arguments as :func:`prepare_sageattn`'s."""
    _check(q, k, v)
    rows = smoothed(q, k, scale, _GRAIN, k_mean=k_mean, with_lse=with_lse, along=True)
    return whole(q, k, rows, _copyable(v))


def prepare_sageattn_3_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> Prepared[Rows, Columns]:
    """The first half of :func:`sageattn_3_fp8`; arguments as :func:`prepare_sageattn`'s."""
    _check(q, k, v)
    # The longest first: while it runs, the small ones are launched.
    columns = e4m3_columns(v, E4M3_MAX)
    rows = smoothed(q, k, scale, _GRAIN_FP8, k_mean=k_mean, with_lse=with_lse, along=False)
    return whole(q, k, rows, columns)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check(q, k, v)
    if block_of(q.shape[3]) != CHANNELS:
        raise ShapeError(f"head size {q.shape[3]}: give a multiple of 8 from 72 to {CHANNELS}")


def _copyable(v: Tensor) -> Tensor:
    """V as the copy engine can read it."""
    return v if is_copyable(v) else v.clone(memory_format=torch.contiguous_format)


_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class _Arguments(ctypes.Structure):
    """``Arguments`` of the kernel."""

    _fields_ = (
        *((name, _P) for name in ("q_scale", "q_dots", "k_scale", "k_bias", "v_scale")),
        *((name, _P) for name in ("blocks", "block_counts", "block_tails", "out", "lse")),
        ("out_scale", _P),
        *((f"o_{axis}", _L) for axis in "bhnd"),
        *((name, _I) for name in ("heads", "shared", "count", "count_padded", "keys")),
        *((name, _I) for name in ("keys_padded", "size", "out_is_half")),
        *((name, _I) for name in ("block_b", "block_h", "zero")),
    )


def _pointer(x: Any) -> int:
    return 0 if x is None else int(x.data_ptr())


def attend(
    prepared: Prepared[Rows, Any],
    *,
    block_mask: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The second half of the three modes; arguments as
    :func:`sagewan.kernels.int8_attention.attend`'s. Of ``sageattn_3_fp8`` out may be float8_e4m3fn,
    channels contiguous: the result divided by :func:`output_scale`. Raises ShapeError for scales
    that are finer than for 64 queries and 64 keys."""
    check_grain(prepared, _GRAIN)
    out, lse = outputs(prepared, out, return_lse=return_lse)
    batch, heads, count, _ = out.shape
    # Tensors that the kernel reads must live until it is launched.
    visits, out_scale = lists(prepared, block_mask), _scale_of(out, prepared)
    arguments = _arguments(prepared, out, visits)
    arguments.lse, arguments.out_scale = _pointer(lse), _pointer(out_scale)
    form = Form(_values(prepared).dtype, math.gcd(prepared.k.rows_per_scale, _KEYS))
    kernel = _kernel(out.device.index, form)
    with torch.cuda.device(out.device):
        grid = -(-count // _ROWS), batch * heads
        kernel.launch(grid, _THREADS, _maps(prepared), arguments)
    return out if lse is None else (out, lse)


def _values(prepared: Prepared[Rows, Any]) -> Tensor:
    """V, as it is stored."""
    v: Tensor = prepared.v.data if isinstance(prepared.v, Columns) else prepared.v
    return v


def _maps(prepared: Prepared[Rows, Any]) -> tuple[Any, ...]:
    """How tiles of Q, K and V are found."""
    v = _values(prepared)
    return (
        tensor_map(prepared.q.data.view(-1, CHANNELS), (64, CHANNELS)),
        tensor_map(prepared.k.data.view(-1, CHANNELS), (_KEYS, CHANNELS)),
        tensor_map(v.view(-1, v.shape[3]), (CHANNELS, _KEYS))
        if isinstance(prepared.v, Columns)
        else tensor_map(v, (1, 1, _KEYS, 64)),
    )


def _arguments(prepared: Prepared[Rows, Any], out: Tensor, visits: Mapping[str, Any]) -> _Arguments:
    """All but the log-sum-exp's place and the scale of an output in FP8."""
    q, k = prepared.q, prepared.k
    _, heads, count, size = out.shape
    return _Arguments(
        q_scale=_pointer(q.scale),
        q_dots=_pointer(q.dots),
        k_scale=_pointer(k.scale),
        k_bias=_pointer(k.dots),
        v_scale=_pointer(prepared.v.scale if isinstance(prepared.v, Columns) else None),
        # Of fewer keys than a block's the list is empty, and has no address.
        blocks=_pointer(visits["blocks"]) or _pointer(visits["block_counts"]),
        block_counts=_pointer(visits["block_counts"]),
        block_tails=_pointer(visits["block_tails"]),
        out=_pointer(out),
        **{f"o_{axis}": stride for axis, stride in zip("bhnd", out.stride(), strict=True)},
        heads=heads,
        shared=heads // k.data.shape[1],
        count=count,
        count_padded=q.data.shape[2],
        keys=prepared.keys,
        keys_padded=k.data.shape[2],
        size=size,
        out_is_half=int(out.dtype == torch.float16),
        block_b=visits["block_b"],
        block_h=visits["block_h"],
        zero=0,
    )


def output_scale(prepared: Prepared[Rows, Columns]) -> Tensor:
    """[B] float32: what an output in e4m3 is to be multiplied by. A row of the output is a mean of
    V's rows, and so no larger than V's largest values, which the formats of V's channels tell; that
    e4m3 has the same precision over fifteen powers of two makes the bound do for every row."""
    return prepared.v.scale.amax((1, 2))


def _scale_of(out: Tensor, prepared: Prepared[Rows, Any]) -> Tensor | None:
    if out.dtype != torch.float8_e4m3fn:
        return None
    if not isinstance(prepared.v, Columns) or out.stride(3) != 1:
        raise ShapeError("an output in FP8 is sageattn_3_fp8's, with contiguous channels")
    return output_scale(prepared)


_sageattn = operator("sageattn_hopper", prepare_sageattn, attend)
_sageattn_3 = operator("sageattn_3_hopper", prepare_sageattn_3, attend)
_sageattn_3_fp8 = operator("sageattn_3_fp8_hopper", prepare_sageattn_3_fp8, attend)
