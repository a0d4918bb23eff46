"""The functions of the table of linear rows (:mod:`sagewan.plan.linear`).

Each takes x [M, K], the packed weight and the bias [N] or None, and gives x·Wᵀ + bias [M, N] in x's
dtype. None looks at what it is given to choose another: that is the plan's work; and none catches
anything: memory that ran out is told.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.checkpoint.packed import Packed, unpack
from sagewan.errors import ShapeError
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.reference import formats


class Gate:
    """What one layer's product is multiplied by before it is added, ``values`` float32 [N], or None
    for 1; the same for all chunks of a video, so it is folded into the layer's scales and bias
    once."""

    def __init__(self, values: Tensor | None) -> None:
        self.values = values
        self._folded: tuple[Tensor, Tensor | None] | None = None

    def folded(self, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scales [N] and the bias [N] in bfloat16 of the layer, times the gate."""
        if self._folded is None:
            scale, values = scale.flatten(), self.values
            if values is not None:
                scale, bias = scale * values, None if bias is None else bias * values
            self._folded = scale, None if bias is None else bias.to(torch.bfloat16)
        return self._folded


def unpacked(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Any format, anywhere: the weight is unpacked to x's dtype, and multiplied."""
    # The layer has multiplied its input by pre_scale already.
    weight = unpack(_without_pre_scale(packed), x.dtype)
    return F.linear(x, weight, _like(bias, x))


def fp8_rows(x: Tensor | Fp8Rows, packed: Packed, bias: Tensor | None) -> Tensor:
    """FP8 by FP8: x is rounded to e4m3 with a scale per row, in one pass, if it is not so yet."""
    return product_of_rows(_as_fp8(x), packed.data, _scale(packed), bias)


def fp8_rows_of_nvfp4(x: Tensor | Fp8Rows, packed: Packed, bias: Tensor | None) -> Tensor:
    """As :func:`fp8_rows`, of an FP4 weight, which becomes e4m3 for the moment of the product."""
    return product_of_rows(_as_fp8(x), *_unpacked_e4m3(packed), bias)


def add_fp8_rows(x: Fp8Rows, packed: Packed, bias: Tensor | None, gate: Gate, into: Tensor) -> None:
    """into += gate·(what :func:`fp8_rows` gives), rounded once; into bfloat16 [M, N]."""
    _add(x, packed.data, gate.folded(_scale(packed), bias), into)


def add_fp8_rows_of_nvfp4(
    x: Fp8Rows, packed: Packed, bias: Tensor | None, gate: Gate, into: Tensor
) -> None:
    """As :func:`add_fp8_rows`, of what :func:`fp8_rows_of_nvfp4` gives."""
    weight, scale = _unpacked_e4m3(packed)
    _add(x, weight, gate.folded(scale, bias), into)


def gelu_fp8_rows(
    x: Fp8Rows, packed: Packed, bias: Tensor | None, known: dict[torch.device, Tensor]
) -> Fp8Rows:
    """GELU's approximation by tanh of what :func:`fp8_rows` gives, in FP8. ``known`` keeps, for the
    next call, what the weight's rows say of the results' size."""
    return _gelu(x, packed.data, _scale(packed), bias, known)


def gelu_fp8_rows_of_nvfp4(
    x: Fp8Rows, packed: Packed, bias: Tensor | None, known: dict[torch.device, Tensor]
) -> Fp8Rows:
    """As :func:`gelu_fp8_rows`, of what :func:`fp8_rows_of_nvfp4` gives."""
    return _gelu(x, *_unpacked_e4m3(packed), bias, known)


def nvfp4_unpacked(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """An FP4 weight, unpacked to x's dtype by one kernel, and multiplied in 16 bit."""
    from sagewan.kernels.nvfp4_unpack import unpack_16

    weight = unpack_16(packed.data, _scale(packed), _tensor_scale(packed), packed.shape, x.dtype)
    return F.linear(x, weight, _like(bias, x))


def thin(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """A few rows: one kernel reads the packed weight once and unpacks it in its registers."""
    from sagewan.kernels.thin_linear import thin_fp8, thin_nvfp4

    if packed.format == "nvfp4":
        scales = _scale(packed), _tensor_scale(packed)
        return thin_nvfp4(x, packed.data, *scales, packed.shape, _like(bias, x))
    return thin_fp8(x, packed.data, _scale(packed), _like(bias, x))


def nvfp4(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """FP4 by FP4 in Blackwell's hardware; x gets block scales, and one scale of the whole."""
    from sagewan.checkpoint import kitchen

    rows = kitchen.multiply_nvfp4(x, packed.data, _scale(packed), _tensor_scale(packed))
    out = rows[: x.shape[0], : packed.shape[0]]
    return out if bias is None else out + bias.to(x.dtype)


def emulated_fp8(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The formats of :func:`fp8_rows` multiplied in float32."""
    weight = packed.data.float() * _scale(packed)
    rounded = formats.e4m3_per_row(x).value()
    return F.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)


def emulated_nvfp4(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The formats of :func:`nvfp4` multiplied in float32."""
    weight = unpack(_without_pre_scale(packed), torch.float32)
    rounded = formats.nvfp4(x).value()
    return F.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)


def product_of_rows(
    x: Fp8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Rows [M, K] by e4m3 [N, K] with float32 scales [N, 1] → bfloat16 [M, N]."""
    # Its fast accumulation adds in the tensor core's 14 bits, an error far below e4m3's own.
    out: Tensor = torch._scaled_mm(  # noqa: SLF001 torch.nn.functional.scaled_mm lacks a fast mode
        x.data,
        weight.t(),
        scale_a=x.aligned_scale,
        scale_b=weight_scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out


def _add(x: Fp8Rows, weight: Tensor, by: tuple[Tensor, Tensor | None], into: Tensor) -> None:
    from sagewan.kernels.cublas_lt import add_product

    add_product(x, weight, *by, into)


def _gelu(
    x: Fp8Rows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    known: dict[torch.device, Tensor],
) -> Fp8Rows:
    from sagewan.kernels.gelu_product import bound_of, gelu_product

    bound = known.get(weight.device)
    if bound is None:
        bound = known[weight.device] = bound_of(weight, weight_scale, bias)
    bias = None if bias is None else bias.to(torch.bfloat16)
    return gelu_product(x, weight, weight_scale.contiguous(), bias, bound)


def _unpacked_e4m3(packed: Packed) -> tuple[Tensor, Tensor]:
    """An FP4 weight as e4m3 [N, K], and its scales [N, 1]."""
    from sagewan.kernels.nvfp4_unpack import E4M3_STEPS, unpack_e4m3

    weight = unpack_e4m3(packed.data, _scale(packed), packed.shape)
    return weight, (_tensor_scale(packed) * E4M3_STEPS).expand(packed.shape[0], 1).contiguous()


def _as_fp8(x: Tensor | Fp8Rows) -> Fp8Rows:
    from sagewan.kernels.fp8_linear import quantize_rows

    return x if isinstance(x, Fp8Rows) else quantize_rows(x)


def _without_pre_scale(packed: Packed) -> Packed:
    return packed if packed.pre_scale is None else replace(packed, pre_scale=None)


def _scale(packed: Packed) -> Tensor:
    if packed.scale is None:
        raise ShapeError(f"a weight in {packed.format} has no scale")
    return packed.scale


def _tensor_scale(packed: Packed) -> Tensor:
    if packed.tensor_scale is None:
        raise ShapeError(f"a weight in {packed.format} has no scale of the whole tensor")
    return packed.tensor_scale


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
