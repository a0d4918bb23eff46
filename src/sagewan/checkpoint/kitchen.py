"""comfy-kitchen's number formats: the one place where that package is imported.

Its formats are those of Comfy's files, bit for bit: NVFP4 with the high nibble first and the block
scales in cuBLAS's swizzle, MXFP8 with one power of two per 32. Its functions are used by name, and
never its tensor class, which unpacks quietly and takes running out of memory for a missing kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy_kitchen
import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# An FP4 block's scale is itself e4m3: the largest weight is 448 · 6 steps of the tensor's scale.
NVFP4_MAX = E4M3_MAX * E2M1_MAX
NVFP4_GROUP = 16
MXFP8_GROUP = 32


def quantize_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] of any float dtype → data uint8 [N', K'/2], block scales e4m3 in the swizzle, and the
    tensor's scale, float32 []; N' and K' are N and K rounded up to 16."""
    # comfy-kitchen's GPU kernels take 16 bits, but the largest value decides the scale exactly.
    tensor_scale = nonzero(weight.abs().amax().float() / NVFP4_MAX)
    with _on_any_gpu():
        data, scale = comfy_kitchen.quantize_nvfp4(weight.contiguous(), tensor_scale, pad_16x=True)
    return data, scale, tensor_scale


def unpack_nvfp4(data: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """What :func:`quantize_nvfp4` gave → float32 [N', K']."""
    with _on_any_gpu():
        # In 16 bits it would round the scales as well.
        unpacked: Tensor = comfy_kitchen.dequantize_nvfp4(data, tensor_scale, scale, torch.float32)
    return unpacked


def multiply_nvfp4(x: Tensor, data: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """x [M, K] in 16 bit times an FP4 weight [N', K'] as above → [M', N'], on Blackwell."""
    rows, row_scale, own_scale = quantize_nvfp4(x)
    out: Tensor = comfy_kitchen.scaled_mm_nvfp4(
        rows, data, own_scale, tensor_scale, row_scale, scale, out_dtype=x.dtype
    )
    return out


def unpack_mxfp8(data: Tensor, scale: Tensor) -> Tensor:
    """data e4m3 [N', K'] and its powers of two, e8m0 in the swizzle → float32 [N', K']."""
    powers = scale.view(torch.float8_e8m0fnu)
    with _on_any_gpu():
        unpacked: Tensor = comfy_kitchen.dequantize_mxfp8(data, powers, torch.float32)
    return unpacked


@contextmanager
def _on_any_gpu() -> Iterator[None]:
    """Its CUDA kernels if its wheel has them for this Python, else plain torch: of its Triton
    kernels, which would come second, some only compile for Blackwell."""
    if comfy_kitchen.registry.is_available("cuda"):
        yield
        return
    with comfy_kitchen.use_backend("eager"):
        yield


def swizzle(scale: Tensor) -> Tensor:
    """Block scales [N, blocks], row by row → [N'', blocks''] in the order that cuBLAS reads, padded
    with zeros to 128 rows and 4 blocks."""
    swizzled: Tensor = comfy_kitchen.to_blocked(scale, flatten=False)
    return swizzled


def unswizzle(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """The block scales of :func:`swizzle` → [rows, blocks]."""
    plain: Tensor = comfy_kitchen.from_blocked(scale, rows, blocks)
    return plain


def nonzero(scale: Tensor) -> Tensor:
    """A scale that can divide: tensors of zeros take 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
