"""x·Wᵀ for a few rows of x, in Triton: W is read once as it is packed, and unpacked in registers.

With so few rows the time is that of reading W, so a smaller W is faster. The products are of 16-bit
values, in which both formats are exact: the tensor's scale, or the row's, comes after the sum. For
8.0 and newer; W's sides are multiples of 16.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels import nvfp4_unpack
from sagewan.kernels.launch import Schedule, launch
from sagewan.kernels.nvfp4_unpack import e2m1, e4m3, swizzled

MAX_ROWS = 16
# The least that a tensor core's product takes; rows beyond x's are zeros.
_M = 16
_N, _K = 16, 256


def thin_fp8(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] in 16 bit, M up to 16, data float8_e4m3fn [N, K], scale float32 [N, 1], bias [N] →
    [M, N] in x's dtype."""
    if data.shape[0] % 16 or data.shape[1] % 16 or scale.numel() != data.shape[0]:
        raise ShapeError(f"an FP8 weight {list(data.shape)}: give multiples of 16, a scale a row")
    arguments = {"data": data.view(torch.uint8), "scale": scale, "tensor_scale": None}
    return _run(x, arguments, bias, data.shape[0], fp4=False)


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
    arguments = {"data": data, "scale": scale.view(torch.uint8), "tensor_scale": tensor_scale}
    return _run(x, arguments, bias, shape[0], fp4=True)


def _run(
    x: Tensor, weight: Mapping[str, Tensor | None], bias: Tensor | None, outputs: int, *, fp4: bool
) -> Tensor:
    rows, columns = x.shape
    if rows > MAX_ROWS:
        raise ShapeError(f"{rows} rows: the kernel takes up to {MAX_ROWS}")
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    arguments = {
        "x": x.contiguous(),
        **weight,
        "bias": bias,
        "out": out,
        "rows": rows,
        "outputs": outputs,
        "columns": columns,
        "scale_blocks": triton.cdiv(columns, 64),
        "FP4": fp4,
        "M": _M,
        "N": _N,
        "K": _K,
    }
    launch(
        _thin_linear_kernel,
        (triton.cdiv(outputs, _N),),
        x.device,
        arguments,
        Schedule(warps=4, stages=4),
    )
    return out


@triton.jit
def _thin_linear_kernel(
    x,  # [M, K] 16 bit
    data,  # uint8 [N, K/2], or [N, K] of e4m3's bits
    scale,  # e4m3's bits in the swizzle, or [N] float32
    tensor_scale,  # [] float32 for FP4
    bias,  # [N] or None
    out,  # [M, N]
    rows, outputs, columns, scale_blocks,
    FP4: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, M)[:, None]
    output = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, columns, K):
        column = start + tl.arange(0, K)
        inputs = tl.load(
            x + row * columns + column[None, :],
            mask=(row < rows) & (column < columns)[None, :],
            other=0.0,
        )
        inside = (output < outputs)[:, None] & (column < columns)[None, :]
        if FP4:
            place = (start // 2 + tl.arange(0, K // 2))[None, :]
            whole = (output < outputs)[:, None] & (place < columns // 2)
            offsets = output[:, None].to(tl.int64) * (columns // 2) + place
            packed = tl.load(data + offsets, mask=whole, other=0).to(tl.int32)
            where = swizzled(output[:, None], place // 8, scale_blocks)
            factor = e4m3(tl.load(scale + where, mask=whole, other=0).to(tl.int32))
            weight = tl.interleave(e2m1(packed >> 4) * factor, e2m1(packed & 15) * factor)
        else:
            offsets = output[:, None].to(tl.int64) * columns + column[None, :]
            weight = e4m3(tl.load(data + offsets, mask=inside, other=0).to(tl.int32))
        total = tl.dot(inputs, tl.trans(weight.to(inputs.dtype)), total)
    if FP4:
        total *= tl.load(tensor_scale)
    else:
        total *= tl.load(scale + output, mask=output < outputs, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    places = row * outputs + output[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=(row < rows) & (output < outputs))
