"""x·Wᵀ for a few rows of x, in Triton: W is read once as it is packed, and unpacked in registers.

With so few rows the time is that of reading W, so a smaller W is faster, and rounding x as well
would gain nothing: x stays in 16 bit, the products and their sums are float32, and the tensor's
scale, or the row's, comes after the sum. A thread holds eight neighbouring columns of a few rows of
W, whose values meet the same eight of each row of x; no memory is shared before the last sum. For
8.0 and newer; W's sides are multiples of 16.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels import nvfp4_unpack
from sagewan.kernels.launch import Repeated, Schedule, compute_capability
from sagewan.kernels.nvfp4_unpack import E2M1_BITS, block_scale, e2m1_columns, row_of

# With more, the additions take longer than reading the weight: slower than 16 bit.
MAX_ROWS = 4
# Columns a step: eight a thread, 16 bytes of x.
_K = 1024
_WARPS = _K // 256
# Rows of W in a block of threads.
_N = 4
# What e4m3's values are multiplied by when their bits are read as float16's.
_E4M3_BITS = tl.constexpr(256.0)


def thin_fp8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] in 16 bit, M up to 4, data float8_e4m3fn [N, K], scale float32 [N, 1], bias [N] →
    [M, N] in x's dtype."""
    outputs, columns = data.shape
    if outputs % 16 or columns % 16 or scale.shape != (outputs, 1):
        raise ShapeError(f"an FP8 weight {list(data.shape)}: give multiples of 16, a scale a row")
    return _run(x, (data.view(torch.uint8), scale, None), bias, outputs, fp4=False)


def thin_nvfp4(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    """As :func:`thin_fp8` for an NVFP4 weight [N, K], as
    :func:`sagewan.kernels.nvfp4_unpack.unpack_16` takes it."""
    nvfp4_unpack.check(data, scale, shape)
    return _run(x, (data, scale.view(torch.uint8), tensor_scale), bias, shape[0], fp4=True)


def _run(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    outputs: int,
    *,
    fp4: bool,
) -> Tensor:
    rows, columns = x.shape
    if rows > MAX_ROWS:
        raise ShapeError(f"{rows} rows: the kernel takes up to {MAX_ROWS}")
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    grid, constants = _form(rows, outputs, fp4, compute_capability(x.device) >= 89)
    data, scale, tensor_scale = weight
    arguments = {
        "x": x.contiguous(),
        "data": data,
        "scale": scale,
        "tensor_scale": tensor_scale,
        "bias": bias,
        "out": out,
        "rows": rows,
        "outputs": outputs,
        "columns": columns,
        **constants,
    }
    kind = fp4, rows, outputs, columns, x.dtype, None if bias is None else bias.dtype
    _launch(kind, grid, x.device, arguments)
    return out


@cache
def _form(
    rows: int, outputs: int, fp4: bool, native: bool
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid and the kernel's constants: found once, for they take as long as a launch."""
    grid = triton.cdiv(outputs, 128) * 128 // _N, 1, 1
    constants = {
        "FP4": fp4,
        "NATIVE": native,
        "M": triton.next_power_of_2(rows),
        "N": _N,
        "K": _K,
    }
    return grid, constants


@triton.jit
def _thin_linear_kernel(
    x,  # [M, K] 16 bit
    data,  # uint8 [N, K/2], or [N, K] of e4m3's bits
    scale,  # e4m3's bits in the swizzle, or [N] float32
    tensor_scale,  # [] float32 for FP4
    bias,  # [N] or None
    out,  # [M, N]
    rows, outputs, columns,
    FP4: tl.constexpr, NATIVE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    totals = ()
    for _ in tl.static_range(M * N):
        totals = totals + (tl.zeros((K // 8,), tl.float32),)
    for start in range(0, columns, K):
        eight = start // 8 + tl.arange(0, K // 8)
        within = eight < columns // 8
        weights, factors = (), ()
        for n in tl.static_range(N):
            # One row at a time: it lies over the threads as a row of x does.
            output = row_of(place, n, N).to(tl.int64)
            inside = within & (output < outputs)
            if FP4:
                weights = weights + (e2m1_columns(data + output * (columns // 2), eight, inside),)
                byte = tl.load(scale + block_scale(output, eight, columns), mask=inside, other=0)
                factors = factors + (_e4m3(byte, NATIVE),)
            else:
                weights = weights + (_fp8(data + output * columns, eight, inside, NATIVE),)
        sums = ()
        for m in tl.static_range(M):
            places = m * columns + eight[:, None] * 8 + tl.arange(0, 8)[None, :]
            inputs = tl.load(x + places, mask=within[:, None] & (m < rows), other=0.0)
            inputs = inputs.to(tl.float32)
            if FP4:
                inputs = _columns(inputs, K)
            for n in tl.static_range(N):
                if FP4:
                    made = _dot_of_eight(weights[n], inputs) * factors[n]
                else:
                    made = tl.sum(weights[n] * inputs, 1)
                sums = sums + (totals[m * N + n] + made,)
        totals = sums
    output = row_of(place, tl.arange(0, N), N)
    inside = output < outputs
    if FP4:
        factor = tl.load(tensor_scale) * E2M1_BITS
    else:
        factor = tl.load(scale + output, mask=inside, other=0.0)
    if not NATIVE:
        factor *= _E4M3_BITS
    for m in tl.static_range(M):
        total = _sums(totals, m * N, K) * factor
        if bias is not None:
            total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
        places = out + m * outputs + output
        tl.store(places, total.to(out.dtype.element_ty), mask=inside & (m < rows))


@triton.jit
def _sums(totals, first, K: tl.constexpr):
    """Four of the totals [K/8], each added up, in their order → [4]."""
    even = tl.join(totals[first], totals[first + 2])
    odd = tl.join(totals[first + 1], totals[first + 3])
    return tl.sum(tl.join(even, odd).reshape(K // 8, 4), 0)


@triton.jit
def _fp8(row, eight, inside, NATIVE: tl.constexpr):
    """Eights of e4m3 → float32 [K/8, 8]."""
    places = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
    return _e4m3(tl.load(row + places, mask=inside[:, None], other=0), NATIVE)


@triton.jit
def _columns(inputs, K: tl.constexpr):
    """[K/8, 8] → its eight columns."""
    even, odd = tl.split(inputs.reshape(K // 8, 2, 2, 2))
    zeros, twos = tl.split(even)
    ones, threes = tl.split(odd)
    zero, four = tl.split(zeros)
    one, five = tl.split(ones)
    two, six = tl.split(twos)
    three, seven = tl.split(threes)
    return zero, one, two, three, four, five, six, seven


@triton.jit
def _dot_of_eight(a, b):
    """The sum of eight products of [K/8] with [K/8]."""
    total = a[0] * b[0]
    for column in tl.static_range(1, 8):
        total += a[column] * b[column]
    return total


@triton.jit
def _e4m3(byte, NATIVE: tl.constexpr):
    """A value of e4m3 as float32; where the hardware has none, 2⁸ too small."""
    if NATIVE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    bits = byte.to(tl.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


_launch = Repeated(_thin_linear_kernel, Schedule(warps=_WARPS))
