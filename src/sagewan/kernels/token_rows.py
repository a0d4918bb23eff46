"""What a Wan block does to whole rows of tokens between its products, each in one pass, in Triton.

:func:`add_and_norm` adds a gated residual to the hidden state, normalises it, modulates it and
writes it as the next product takes it: FP8 with a scale a row, or 16 bit. :func:`norm_and_rotate`
is the RMS norm of Q or K over all heads, and its rotary positions. A block of threads holds one row
in its registers and computes in float32; what is added to the hidden state is rounded to its dtype
before it is normalised, as if the two were apart. For 8.0 and newer, FP8 for 8.9 and newer.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.fp8_linear import cut, load_part, store_fp8, store_part
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.launch import launch

# 64 values a thread in 8 warps.
MAX_COLUMNS = 16384
Rotary = tuple[Tensor, Tensor]
# All other strides are multiples of 16, and known to be so: else each value is loaded by itself.
_VARYING = ("s_b",)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """hidden += y·gate: y [B, N, W] in 16 bit, gate [B or 1, W] float32 or None for 1."""

    y: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Layer norm: (x − mean) / √(variance + eps) · weight + bias, then · (1 + scale) + shift.

    weight and bias [W], shift and scale [B or 1, W] float32; each pair may be None. ``eps`` None
    leaves x as it is.
    """

    eps: float | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None


def add_and_norm(
    hidden: Tensor,
    norm: Norm | None,
    out: Tensor | Fp8Rows | None,
    residual: Residual | None = None,
) -> None:
    """Add ``residual`` to hidden [B, N, W] in place, and write its ``norm`` to ``out`` [B, N, W];
    both None where only the residual is wanted.

    Rows may lie apart, the columns of a row are adjacent. Raises ShapeError for other strides, and
    for more columns than a block holds.
    """
    batch, tokens, columns = hidden.shape
    wanted: tuple[Tensor | None, ...] = (norm.shift, norm.scale) if norm else ()
    wanted += (residual.gate,) if residual else ()
    vectors = [x for x in wanted if x is not None]
    data = out.data if isinstance(out, Fp8Rows) else out
    y = residual.y if residual else None
    _check(hidden, *(x for x in (y, data, *vectors) if x is not None))
    strides = {0 if x.shape[0] == 1 else x.stride(0) for x in vectors}
    if len(strides) > 1:
        raise ShapeError("the vectors of a time lie apart: give views of one tensor")
    parts, block, schedule = cut(columns)
    arguments = {
        "hidden": hidden,
        "h_b": hidden.stride(0),
        "y": y,
        "y_b": y.stride(0) if y is not None else 0,
        "gate": residual.gate if residual else None,
        "weight": norm.weight if norm else None,
        "bias": norm.bias if norm else None,
        "shift": norm.shift if norm else None,
        "scale": norm.scale if norm else None,
        "v_b": max(strides, default=0),
        "out": data,
        "o_b": data.stride(0) if data is not None else 0,
        "scales": out.scale if isinstance(out, Fp8Rows) else None,
        "s_b": out.scale.stride(0) if isinstance(out, Fp8Rows) else 0,
        "norms": out.norm if isinstance(out, Fp8Rows) else None,
        "eps": 0.0 if norm is None or norm.eps is None else norm.eps,
        "NORM": norm is not None and norm.eps is not None,
        "COLUMNS": columns,
        "PARTS": parts,
        "BLOCK": block,
    }
    launch(_norm_kernel, (tokens, batch), hidden.device, arguments, schedule)


def norm_and_rotate(
    x: Tensor, out: Tensor, weight: Tensor, eps: float | None, rotary: Rotary | None
) -> None:
    """x [B, N, H, D] → out, x / √(mean of squares over H and D + eps) · weight [H·D], each pair of
    channels (2i, 2i+1) turned by ``rotary``: cos and sin, float32 [1, N, 1, D] with every angle
    written twice. ``out`` may be x; ``eps`` None is float32's."""
    batch, tokens, heads, size = x.shape
    cos, sin = rotary or (None, None)
    _check(x.flatten(2), out.flatten(2))
    gaps = any(t is not None and t.stride(1) != size for t in (cos, sin))
    if size & (size - 1) or size > 256 or gaps:
        raise ShapeError(
            f"head size {size}: give a power of two up to 256, and rotary tables without gaps"
        )
    parts, block, schedule = cut(heads * size)
    arguments = {
        "x": x,
        "x_b": x.stride(0),
        "out": out,
        "o_b": out.stride(0),
        "weight": weight,
        "cos": cos,
        "sin": sin,
        "eps": torch.finfo(torch.float32).eps if eps is None else eps,
        "SIZE": size,
        "COLUMNS": heads * size,
        "PARTS": parts,
        "BLOCK": block,
    }
    launch(_rotate_kernel, (tokens, batch), x.device, arguments, schedule)


def _check(*tensors: Tensor) -> None:
    columns = tensors[0].shape[-1]
    if columns > MAX_COLUMNS:
        raise ShapeError(f"{columns} columns: the kernel takes up to {MAX_COLUMNS}")
    for x in tensors:
        if x.stride(-1) != 1 or (x.dim() == 3 and x.shape[1] > 1 and x.stride(1) != columns):
            raise ShapeError(f"strides {x.stride()} of {list(x.shape)}: give rows without gaps")


@triton.jit(do_not_specialize=_VARYING)
def _norm_kernel(
    hidden, h_b,  # [B, N, W]
    y, y_b,  # [B, N, W] or None
    gate,  # [B, W] float32 or None
    weight, bias,  # [W] or None
    shift, scale, v_b,  # [B, W] float32 or None
    out, o_b,  # [B, N, W] 16 bit, or float8_e4m3fn with its scales, or None
    scales, s_b,  # [B, N] float32 or None
    norms,  # [B, N] float32 in the same strides, or None
    eps,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = hidden + batch * h_b + token * COLUMNS
    values = ()
    for part in tl.static_range(PARTS):
        loaded = load_part(row, part, COLUMNS, BLOCK, True)
        if y is not None:
            added = load_part(y + batch * y_b + token * COLUMNS, part, COLUMNS, BLOCK, True)
            if gate is not None:
                added *= load_part(gate + batch * v_b, part, COLUMNS, BLOCK, False)
            rounded = (loaded + added).to(hidden.dtype.element_ty)
            store_part(row, rounded, part, COLUMNS, BLOCK)
            loaded = rounded.to(tl.float32)
        values = values + (loaded,)
    if out is not None:
        if NORM:
            values = _normalised(values, eps, COLUMNS, PARTS, BLOCK)
        made = ()
        for part in tl.static_range(PARTS):
            value = values[part]
            if weight is not None:
                value *= load_part(weight, part, COLUMNS, BLOCK, False)
                value += load_part(bias, part, COLUMNS, BLOCK, False)
            if scale is not None:
                value *= 1.0 + load_part(scale + batch * v_b, part, COLUMNS, BLOCK, False)
                value += load_part(shift + batch * v_b, part, COLUMNS, BLOCK, False)
            made = made + (value,)
        target = out + batch * o_b + token * COLUMNS
        if norms is not None:
            squares = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(PARTS):
                squares += made[part] * made[part]
            tl.store(norms + batch * s_b + token, tl.sqrt(tl.sum(squares, 0)))
        if scales is not None:
            store_fp8(target, scales + batch * s_b + token, made, PARTS, COLUMNS, BLOCK)
        else:
            for part in tl.static_range(PARTS):
                store_part(target, made[part].to(out.dtype.element_ty), part, COLUMNS, BLOCK)


@triton.jit
def _normalised(values, eps, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's parts minus their mean, divided by the root of their variance."""
    total = values[0]
    for part in tl.static_range(1, PARTS):
        total += values[part]
    mean = tl.sum(total, 0) / COLUMNS
    squares = tl.zeros((BLOCK,), tl.float32)
    centred = ()
    for part in tl.static_range(PARTS):
        value = values[part] - mean
        if (part + 1) * BLOCK > COLUMNS:
            value = tl.where(part * BLOCK + tl.arange(0, BLOCK) < COLUMNS, value, 0.0)
        squares += value * value
        centred = centred + (value,)
    factor = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
    made = ()
    for part in tl.static_range(PARTS):
        made = made + (centred[part] * factor,)
    return made


@triton.jit
def _rotate_kernel(
    x, x_b,  # [B, N, H, D]
    out, o_b,  # the same
    weight,  # [H·D]
    cos, sin,  # [N, D] float32, or None
    eps,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    values = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        loaded = load_part(x + batch * x_b + token * COLUMNS, part, COLUMNS, BLOCK, True)
        squares += loaded * loaded
        values = values + (loaded,)
    factor = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
    if cos is not None:
        # Parts hold whole heads, which all turn alike.
        pair = token * SIZE + tl.arange(0, BLOCK // 2) % (SIZE // 2) * 2
        turn_cos = tl.load(cos + pair)
        turn_sin = tl.load(sin + pair + 1)
    for part in tl.static_range(PARTS):
        value = values[part] * factor * load_part(weight, part, COLUMNS, BLOCK, False)
        if cos is not None:
            even, odd = tl.split(value.reshape(BLOCK // 2, 2))
            turned = tl.join(even * turn_cos - odd * turn_sin, even * turn_sin + odd * turn_cos)
            value = turned.reshape(BLOCK)
        target = out + batch * o_b + token * COLUMNS
        store_part(target, value.to(out.dtype.element_ty), part, COLUMNS, BLOCK)
