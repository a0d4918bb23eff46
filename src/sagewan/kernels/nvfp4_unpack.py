"""NVFP4 weights unpacked in one pass, in Triton: to 16 bit, or to e4m3 for an FP8 product.

A weight is e2m1 · e4m3 · a float32 scale of the tensor, the e4m3 one for each 16 of a row and
stored in cuBLAS's swizzle (docs.nvidia.com/cuda/cublas, "1D Block Scaling Factors Layout"). Both
small formats are read by their bits, so that 8.0 and newer can do it; only the writing of e4m3
wants 8.9.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.launch import Schedule, launch

GROUP = 16
# An unpacked weight is e2m1 · e4m3, at most 2688; e4m3 holds 448. A power of two costs no bit.
E4M3_STEPS = 8.0
_STEPS = tl.constexpr(E4M3_STEPS)
# What e2m1's values are multiplied by when their bits are read as float16's.
E2M1_BITS = tl.constexpr(16384.0)
# Rows and columns a block of threads, of which each has eight columns of a row.
_ROWS, _COLUMNS = 8, 1024


def unpack_16(
    data: Tensor, scale: Tensor, tensor_scale: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """data uint8 [N, K/2], high nibble first, scale e4m3 in the swizzle, tensor_scale float32 [] →
    [N, K] in bfloat16 or float16, rounded once. N and K are multiples of 16."""
    return _unpacked(data, scale, tensor_scale, shape, dtype)


def unpack_e4m3(data: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """As :func:`unpack_16` → float8_e4m3fn [N, K], the weight less the tensor's scale, divided by
    E4M3_STEPS: a product of 5 bits rounded to e4m3's 4."""
    return _unpacked(data, scale, None, shape, torch.float8_e4m3fn)


def check(data: Tensor, scale: Tensor, shape: tuple[int, int]) -> None:
    """Raise ShapeError for a weight whose sides are no multiples of 16, or that is not whole."""
    _check_shapes(shape, data.shape, scale.shape)


@cache
def _check_shapes(shape: tuple[int, int], data: torch.Size, scale: torch.Size) -> None:
    rows, columns = shape
    blocks = triton.cdiv(rows, 128) * 128, triton.cdiv(columns, 4 * GROUP) * 4
    if rows % 16 or columns % 16 or data != (rows, columns // 2) or scale != blocks:
        raise ShapeError(
            f"an FP4 weight {list(shape)} with data {list(data)} and scales {list(scale)}: its "
            "sides must be multiples of 16, the data [N, K/2] and the scales padded to 128 rows "
            "and 4 blocks"
        )


def _unpacked(
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    check(data, scale, shape)
    rows, columns = shape
    out = torch.empty(rows, columns, dtype=dtype, device=data.device)
    arguments = {
        "data": data,
        "scale": scale.view(torch.uint8),
        "tensor_scale": tensor_scale,
        "out": out,
        "rows": rows,
        "columns": columns,
        "N": _ROWS,
        "K": _COLUMNS,
    }
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, 128) * 128 // _ROWS)
    launch(_unpack_kernel, grid, data.device, arguments, Schedule(warps=_COLUMNS // 256))
    return out


@triton.jit
def row_of(place, n, N: tl.constexpr):
    """The n-th of the N rows, a multiple of 4, that a program has: in fours of rows 32 apart, whose
    block scales lie side by side."""
    first = place // (128 // N) * 128 + place % (128 // N) * (N // 4)
    return first + n % (N // 4) + n // (N // 4) * 32


@triton.jit
def e2m1_columns(row, eight, inside):
    """Eights of a row's e2m1 → float32 [K/8] of each of their columns, 2¹⁴ too small."""
    # Not as one word: of those the compiler would give four to a thread.
    places = eight[:, None] * 2 + tl.arange(0, 2)[None, :]
    halves = tl.load(row.to(tl.pointer_type(tl.uint16)) + places, mask=inside[:, None], other=0)
    low, high = tl.split(halves.to(tl.uint32))
    word = low | (high << 16)
    # float16 has e2m1's fields at bits 15 and 9 to 11, with a larger bias. The even columns are in
    # the high nibbles; a pair of columns four apart lies 16 bits apart.
    one, five = _halves(word << 12)
    zero, four = _halves(word << 8)
    three, seven = _halves(word << 4)
    two, six = _halves(word)
    return zero, one, two, three, four, five, six, seven


@triton.jit
def _halves(word):
    """The e2m1 in bits 12 to 15 and that in bits 28 to 31."""
    both = (word & 0x80008000) | ((word >> 3) & 0x0E000E00)
    low = both.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3(byte):
    """The value of 8 bits of e4m3 in float32, NaN apart; also where the hardware has none."""
    # float16 with a bias 8 larger.
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def block_scale(output, eight, columns):
    """Where the block scales for eights of a row lie: tiles of 128 rows by 4 blocks of 16, in which
    four rows of each 32 lie side by side."""
    block = eight // 2
    row = output // 128 * tl.cdiv(columns, 64) * 512 + output % 32 * 16 + output % 128 // 32 * 4
    return row + block // 4 * 512 + block % 4


@triton.jit
def _unpack_kernel(
    data,  # [N, K/2] uint8
    scale,  # [N'', blocks''] uint8, in the swizzle
    tensor_scale,  # [] float32, or None for e4m3
    out,  # [N, K]
    rows, columns,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    factor = E2M1_BITS / _STEPS
    if tensor_scale is not None:
        factor = tl.load(tensor_scale) * E2M1_BITS
    eight = tl.program_id(0) * (K // 8) + tl.arange(0, K // 8)
    within = eight < columns // 8
    # All is loaded before anything is stored, for the compiler can't know that they lie apart.
    loaded, steps = (), ()
    for n in tl.static_range(N):
        row = row_of(tl.program_id(1), n, N).to(tl.int64)
        inside = within & (row < rows)
        byte = tl.load(scale + block_scale(row, eight, columns), mask=inside, other=0)
        steps = steps + (e4m3(byte.to(tl.int32)) * factor,)
        loaded = loaded + (e2m1_columns(data + row * (columns // 2), eight, inside),)
    for n in tl.static_range(N):
        row = row_of(tl.program_id(1), n, N).to(tl.int64)
        values = loaded[n]
        even = _joined(values[0], values[2], values[4], values[6], steps[n])
        odd = _joined(values[1], values[3], values[5], values[7], steps[n])
        eights = tl.join(even, odd).reshape(K // 8, 8).to(out.dtype.element_ty)
        places = row * columns + eight[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out + places, eights, mask=(within & (row < rows))[:, None])


@triton.jit
def _joined(zero, two, four, six, step):
    """Four of [K/8], multiplied → [K/8, 2, 2], in their order."""
    return tl.join(tl.join(zero * step, four * step), tl.join(two * step, six * step))
