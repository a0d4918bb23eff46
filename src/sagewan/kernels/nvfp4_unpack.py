"""NVFP4 weights unpacked in one pass, in Triton: to 16 bit, or to e4m3 for an FP8 product.

A weight is e2m1 · e4m3 · a float32 scale of the tensor, the e4m3 one for each 16 of a row and
stored in cuBLAS's swizzle (docs.nvidia.com/cuda/cublas, "1D Block Scaling Factors Layout"). Both
small formats are read by their bits, so that 8.0 and newer can do it; only the writing of e4m3
wants 8.9.
"""

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
_ROWS, _BYTES = 16, 128


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
    rows, columns = shape
    blocks = triton.cdiv(rows, 128) * 128, triton.cdiv(columns, 4 * GROUP) * 4
    if rows % 16 or columns % 16 or data.shape != (rows, columns // 2) or scale.shape != blocks:
        raise ShapeError(
            f"an FP4 weight {list(shape)} with data {list(data.shape)} and scales "
            f"{list(scale.shape)}: its sides must be multiples of 16, the data [N, K/2] and the "
            "scales padded to 128 rows and 4 blocks"
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
        "bytes_": columns // 2,
        "scale_blocks": scale.shape[1] // 4,
        "ROWS": _ROWS,
        "BYTES": _BYTES,
    }
    grid = (triton.cdiv(columns // 2, _BYTES), triton.cdiv(rows, _ROWS))
    launch(_unpack_kernel, grid, data.device, arguments, Schedule(warps=4))
    return out


@triton.jit
def e2m1(nibble):
    """The value of 4 bits (sign, two of exponent, one of mantissa) in float32."""
    # float16 has the same fields with a bias 14 larger; its subnormals are e2m1's ½.
    bits = ((nibble & 8) << 12) | ((nibble & 7) << 9)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e4m3(byte):
    """The value of 8 bits of e4m3 in float32, NaN apart; also where the hardware has none."""
    # float16 with a bias 8 larger.
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def swizzled(row, block, scale_blocks):
    """Where the scale of a block of 16 lies: tiles of 128 rows by 4 blocks, in which four rows of
    each 32 lie side by side."""
    tile = (row // 128) * scale_blocks + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4


@triton.jit
def _unpack_kernel(
    data,  # [N, K/2] uint8
    scale,  # [N'', blocks''] uint8, in the swizzle
    tensor_scale,  # [] float32, or None for e4m3
    out,  # [N, K]
    rows, bytes_, scale_blocks,
    ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    place = (tl.program_id(0) * BYTES + tl.arange(0, BYTES))[None, :]
    inside = (row < rows) & (place < bytes_)
    packed = tl.load(data + row.to(tl.int64) * bytes_ + place, mask=inside, other=0).to(tl.int32)
    where = swizzled(row, place // 8, scale_blocks)
    factor = e4m3(tl.load(scale + where, mask=inside, other=0).to(tl.int32))
    if tensor_scale is not None:
        factor *= tl.load(tensor_scale)
    else:
        factor *= 1.0 / _STEPS
    # The even columns are in the high nibbles.
    values = tl.interleave(e2m1(packed >> 4) * factor, e2m1(packed & 15) * factor)
    columns = (tl.program_id(0) * 2 * BYTES + tl.arange(0, 2 * BYTES))[None, :]
    offsets = row.to(tl.int64) * (2 * bytes_) + columns
    tl.store(
        out + offsets,
        values.to(out.dtype.element_ty),
        mask=(row < rows) & (columns < 2 * bytes_),
    )
