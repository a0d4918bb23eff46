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
from sagewan.kernels.fp8_linear import e4m3, row_scale, schedule_for
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.launch import launch

# 32 values a thread in 16 warps.
MAX_COLUMNS = 16384
Rotary = tuple[Tensor, Tensor]
# All other strides are multiples of 16, and known to be so: else each value is loaded by itself.
_VARYING = ("s_b",)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """hidden += y·gate: y [B, N, W] in 16 bit, gate [B, W] float32 or None for 1."""

    y: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Layer norm: (x − mean) / √(variance + eps) · weight + bias, then · (1 + scale) + shift.

    weight and bias [W], shift and scale [B, W] float32; each pair may be None. ``eps`` None leaves
    x as it is.
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
    if any(x.stride(0) != vectors[0].stride(0) for x in vectors):
        raise ShapeError("the vectors of a time lie apart: give views of one tensor")
    block = triton.next_power_of_2(columns)
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
        "v_b": vectors[0].stride(0) if vectors else 0,
        "out": data,
        "o_b": data.stride(0) if data is not None else 0,
        "scales": out.scale if isinstance(out, Fp8Rows) else None,
        "s_b": out.scale.stride(0) if isinstance(out, Fp8Rows) else 0,
        "columns": columns,
        "eps": 0.0 if norm is None or norm.eps is None else norm.eps,
        "NORM": norm is not None and norm.eps is not None,
        "BLOCK": block,
    }
    launch(_norm_kernel, (tokens, batch), hidden.device, arguments, schedule_for(block))


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
    if size & (size - 1) or gaps:
        raise ShapeError(f"head size {size}: give a power of two, and rotary tables without gaps")
    lanes = triton.next_power_of_2(heads)
    arguments = {
        "x": x,
        "x_b": x.stride(0),
        "out": out,
        "o_b": out.stride(0),
        "weight": weight,
        "cos": cos,
        "sin": sin,
        "heads": heads,
        "eps": torch.finfo(torch.float32).eps if eps is None else eps,
        "SIZE": size,
        "HEADS": lanes,
    }
    launch(_rotate_kernel, (tokens, batch), x.device, arguments, schedule_for(lanes * size))


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
    columns, eps,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < columns
    row = hidden + batch * h_b + token * columns
    # What streams by once is not to push the vectors, which all rows share, out of the near cache.
    values = tl.load(row + places, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    if y is not None:
        added = tl.load(
            y + batch * y_b + token * columns + places, mask=inside, other=0.0,
            cache_modifier=".cg",
        ).to(tl.float32)  # fmt: skip
        if gate is not None:
            added *= tl.load(gate + batch * v_b + places, mask=inside, other=0.0)
        rounded = (values + added).to(hidden.dtype.element_ty)
        tl.store(row + places, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if out is not None:
        if NORM:
            mean = tl.sum(values, 0) / columns
            centred = tl.where(inside, values - mean, 0.0)
            variance = tl.sum(centred * centred, 0) / columns
            values = centred * tl.rsqrt(variance + eps)
        if weight is not None:
            values *= tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
            values += tl.load(bias + places, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            values *= 1.0 + tl.load(scale + batch * v_b + places, mask=inside, other=0.0)
            values += tl.load(shift + batch * v_b + places, mask=inside, other=0.0)
        target = out + batch * o_b + token * columns + places
        if scales is not None:
            step = row_scale(values)
            tl.store(scales + batch * s_b + token, step)
            tl.store(target, e4m3(values, step), mask=inside)
        else:
            tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    x, x_b,  # [B, N, H, D]
    out, o_b,  # the same
    weight,  # [H·D]
    cos, sin,  # [N, D] float32, or None
    heads, eps,
    SIZE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = x + batch * x_b + token * heads * SIZE
    head = tl.arange(0, HEADS)[:, None]
    places = head * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (head < heads) & (places >= 0)
    values = tl.load(row + places, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(values * values, 1), 0)
    values *= tl.rsqrt(squares / (heads * SIZE) + eps)
    values *= tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        even, odd = tl.split(values.reshape(HEADS, SIZE // 2, 2))
        pair = 2 * tl.arange(0, SIZE // 2)[None, :]
        turn_cos = tl.load(cos + token * SIZE + pair)
        turn_sin = tl.load(sin + token * SIZE + pair + 1)
        turned = tl.join(even * turn_cos - odd * turn_sin, even * turn_sin + odd * turn_cos)
        values = turned.reshape(HEADS, SIZE)
    target = out + batch * o_b + token * heads * SIZE
    tl.store(target + places, values.to(out.dtype.element_ty), mask=inside)
