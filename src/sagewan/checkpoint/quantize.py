"""One weight in 16 or 32 bit → the same weight packed."""

import torch
from torch import Tensor

from sagewan.checkpoint import kitchen
from sagewan.checkpoint.compensate import compensated
from sagewan.checkpoint.nvfp4 import quantize_nvfp4
from sagewan.checkpoint.packed import FP8_DTYPES, Packed, unpack
from sagewan.errors import RequestError


def pack(
    weight: Tensor, format_: str, *, per_tensor: bool = False, directions: Tensor | None = None
) -> Packed:
    """[N, K] on any device → packed there, in ``float8_e4m3fn`` or ``nvfp4``.

    FP8 gets a scale for each row, which keeps a row of small weights out of the subnormals, or one
    for the tensor, as ComfyUI's files have it. Each weight becomes the nearest; with the
    ``directions`` [R, K] of the layer's inputs, as :mod:`sagewan.checkpoint.calibration` keeps
    them, those that lose least of such inputs.
    """
    rows, columns = weight.shape
    if format_ in FP8_DTYPES:
        scale = _fp8_scale(weight, FP8_DTYPES[format_], per_tensor=per_tensor)
        data = _fp8(weight, scale, FP8_DTYPES[format_], directions)
        return Packed(format=format_, shape=(rows, columns), data=data, scale=scale)
    if format_ == "nvfp4":
        data, scale, tensor_scale = quantize_nvfp4(weight, directions)
        return Packed(
            format=format_,
            shape=(rows, columns),
            data=data,
            scale=scale,
            tensor_scale=tensor_scale,
        )
    raise RequestError(f"weights can't be quantised to {format_}: use float8_e4m3fn or nvfp4")


def _fp8_scale(weight: Tensor, dtype: torch.dtype, *, per_tensor: bool) -> Tensor:
    largest = weight.abs().amax() if per_tensor else weight.abs().amax(1, keepdim=True)
    return kitchen.nonzero(largest.float() / torch.finfo(dtype).max)


def _fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype, directions: Tensor | None) -> Tensor:
    def rounded(values: Tensor) -> Tensor:
        # A quotient may leave the range by its last bit, and torch would make it NaN.
        most = torch.finfo(dtype).max
        return (values / scale).clamp_(-most, most).to(dtype)

    if directions is None:
        return rounded(weight.float())
    return rounded(compensated(weight, directions, lambda x, _: rounded(x).float() * scale))


def relative_error(packed: Packed, weight: Tensor) -> float:
    """‖packed − weight‖ / ‖weight‖, in float32; 0 for a weight of zeros that stayed zeros."""
    difference = (unpack(packed, torch.float32) - weight.float()).norm()
    norm = weight.float().norm()
    return float(difference / norm) if norm > 0 else float(difference)
