"""A row of the linear table against float64, on the device it is to serve on."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from sagewan.attention.launch import is_out_of_memory
from sagewan.attention.resolve import ImplementationError, load, one_line
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.quantize import pack
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.model.matmul import Gate
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Device
from sagewan.plan.linear import LinearRow
from sagewan.plan.objection import Objection
from sagewan.reference import formats

# Rounding the input costs FP8 about .027 of the result and FP4 .09, on these inputs; a scale that
# is left out or misplaced costs all of it. What rounds no input has only 16-bit sums to lose by.
_LIMITS = {"16 bit": 0.01, "fp8": 0.05, "fp4": 0.15}
_ROWS, _OUTPUTS, _INPUTS = 300, 272, 528


def self_test(row: LinearRow, device: Device, dtype: str) -> SelfTest:
    """‖y − x·Wᵀ − bias‖ / ‖x·Wᵀ + bias‖ with W as it is stored; the worst of the row's formats, and
    of its product and the one that is added."""
    limit = _LIMITS["fp4" if "nvfp4 ×" in row.compute else "fp8" if row.low else "16 bit"]
    try:
        error = max(_error(row, device, dtype, format_) for format_ in row.formats)
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        inner = failure.objection if isinstance(failure, ImplementationError) else None
        objection = inner or Objection("self-test-crashed", {"error": one_line(failure)})
        return SelfTest(
            implementation=row.name,
            error=None,
            limit=limit,
            milliseconds=None,
            objection=objection,
        )
    return SelfTest(
        implementation=row.name,
        error=error,
        limit=limit,
        milliseconds=None,
        objection=_objection(error, limit),
    )


def _objection(error: float, limit: float) -> Objection | None:
    if not math.isfinite(error):
        return Objection("self-test-not-finite")
    if error > limit:
        values = {"error": f"{error:.3g}", "limit": f"{limit:.3g}"}
        return Objection("self-test-error", values)
    return None


def _error(row: LinearRow, device: Device, dtype: str, format_: str) -> float:
    generator = torch.Generator().manual_seed(0)
    name = device.torch_name
    kind: torch.dtype = getattr(torch, dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(name, kind)

    least, most = row.rows
    x = random(min(max(_ROWS, least), most or _ROWS), _INPUTS)
    x = x * torch.logspace(-3, 2, x.shape[0], device=name, dtype=torch.float32)[:, None].to(kind)
    bias, weight = random(_OUTPUTS) / 100, random(_OUTPUTS, _INPUTS) / 20
    weight[: _OUTPUTS // 2] *= 30
    packed = pack(weight, format_)
    exact = F.linear(x.double(), unpack(packed, torch.float64), bias.double())
    found = load(row)(x, packed, bias).double()
    return max(
        _of_rows(found, exact),
        _error_added(row, x, packed, bias, exact),
        _error_through_gelu(row, x, packed, bias, exact),
    )


def _error_added(
    row: LinearRow, x: torch.Tensor, packed: Packed, bias: torch.Tensor, exact: torch.Tensor
) -> float:
    """Of the product that is added, with a gate of both signs; 0 for a row without one."""
    if row.adds is None:
        return 0.0
    rows = _rounded(x)
    gate = torch.linspace(-2, 2, len(bias), device=x.device)
    before = torch.ones_like(exact) * exact.norm(dim=1, keepdim=True) / exact.shape[1] ** 0.5
    into = before.to(x.dtype)
    load(replace(row, call=row.adds))(rows, packed, bias, Gate(gate), into)
    return _of_rows(into.double(), before.to(x.dtype).double() + gate.double() * exact)


def _error_through_gelu(
    row: LinearRow, x: torch.Tensor, packed: Packed, bias: torch.Tensor, exact: torch.Tensor
) -> float:
    """Of what comes through GELU in FP8; 0 for a row without that."""
    if row.gelu is None:
        return 0.0
    found = load(replace(row, call=row.gelu))(_rounded(x), packed, bias, {})
    value = found.data.double() * found.scale.double()
    return _of_rows(value, F.gelu(exact, approximate="tanh"))


def _rounded(x: torch.Tensor) -> Fp8Rows:
    rounded = formats.e4m3_per_row(x)
    data = rounded.data.to(torch.float8_e4m3fn)
    return Fp8Rows(data, rounded.scale, x.float().norm(dim=1, keepdim=True))


def _of_rows(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Each row by itself: small ones count as much as large ones."""
    errors = (found - exact).norm(dim=1) / exact.norm(dim=1)
    return float(errors.square().mean().sqrt())
