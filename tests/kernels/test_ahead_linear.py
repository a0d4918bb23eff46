"""The linear layers' kernels compile for every architecture their rows claim, without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from sagewan.kernels import fp8_linear, hopper_prepare, nvfp4_unpack, thin_linear, token_rows
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.hopper_prepare import Position
from sagewan.kernels.token_rows import Norm, Residual
from sagewan.plan.linear import LINEAR_ROWS
from tests.kernels.ahead import SHARED_MEMORY, build, record


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X = empty(40, 5120)
DATA, SCALE = empty(5120, 2560, dtype=torch.uint8), empty(5120, 320, dtype=torch.float8_e4m3fn)
ONE, ROWS = empty(dtype=torch.float32), empty(5120, 1, dtype=torch.float32)
FP8 = empty(5120, 5120, dtype=torch.float8_e4m3fn)
BIAS = empty(5120)
SHAPE = (5120, 5120)
ONE_ROW = empty(5120, dtype=torch.float32)
HIDDEN, VECTORS = empty(1, 40, 5120), empty(1, 6, 5120, dtype=torch.float32)
HEADS, ANGLES = empty(1, 40, 40, 128), empty(1, 40, 1, 128, dtype=torch.float32)
POSITION = Position(weight=BIAS, eps=1e-6, cos=ANGLES, sin=ANGLES)
NORM = Norm(eps=1e-6, shift=VECTORS[:, 0], scale=VECTORS[:, 1])
ROWS_8 = Fp8Rows(
    empty(1, 40, 5120, dtype=torch.float8_e4m3fn), empty(1, 40, 1, dtype=torch.float32)
)

# What is launched → (the row that claims it, the launcher).
LAUNCHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "quantize": ("torch.fp8_rows", lambda: fp8_linear.quantize_rows(X)),
    "quantize_wide": ("torch.fp8_rows", lambda: fp8_linear.quantize_rows(empty(40, 13824))),
    "quantize_gelu": (
        "torch.fp8_rows",
        lambda: fp8_linear.quantize_rows(empty(40, 13824), gelu=True),
    ),
    "norm_fp8": ("torch.fp8_rows", lambda: token_rows.add_and_norm(HIDDEN, NORM, ROWS_8)),
    "add_norm_fp8": (
        "torch.fp8_rows",
        lambda: token_rows.add_and_norm(
            HIDDEN, NORM, ROWS_8, Residual(y=HIDDEN, gate=VECTORS[:, 5])
        ),
    ),
    "add_norm_16": (
        "sagewan.nvfp4_unpacked",
        lambda: token_rows.add_and_norm(
            HIDDEN, Norm(eps=1e-6, weight=ONE_ROW, bias=ONE_ROW), HIDDEN, Residual(y=HIDDEN)
        ),
    ),
    "add": (
        "sagewan.nvfp4_unpacked",
        lambda: token_rows.add_and_norm(HIDDEN, None, None, Residual(y=HIDDEN, gate=VECTORS[:, 5])),
    ),
    "as_it_is_fp8": (
        "torch.fp8_rows",
        lambda: token_rows.add_and_norm(HIDDEN, Norm(eps=None), ROWS_8, Residual(y=HIDDEN)),
    ),
    "factors": ("sagewan.hopper", lambda: hopper_prepare.row_factors(HEADS, 1e-6)),
    "turned_mean": (
        "sagewan.hopper",
        lambda: hopper_prepare.turned_mean(HEADS, ONE_ROW.view(1, -1)[:, :40], POSITION),
    ),
    "rms": (
        "sagewan.nvfp4_unpacked",
        lambda: token_rows.norm_and_rotate(HEADS, HEADS, BIAS, 1e-6, None),
    ),
    "rotate": (
        "sagewan.nvfp4_unpacked",
        lambda: token_rows.norm_and_rotate(HEADS, HEADS, BIAS, 1e-6, (ANGLES, ANGLES)),
    ),
    "to_fp8": (
        "torch.fp8_rows_of_nvfp4",
        lambda: nvfp4_unpack.unpack_e4m3(DATA, SCALE, SHAPE),
    ),
    "to_16": (
        "sagewan.nvfp4_unpacked",
        lambda: nvfp4_unpack.unpack_16(DATA, SCALE, ONE, SHAPE, torch.bfloat16),
    ),
    "thin_fp8": ("sagewan.thin", lambda: thin_linear.thin_fp8(X[:1], FP8, ROWS, BIAS)),
    "thin_fp4": (
        "sagewan.thin",
        lambda: thin_linear.thin_nvfp4(X[:2], DATA, SCALE, ONE, SHAPE, None),
    ),
    "thin_fp8_most": ("sagewan.thin", lambda: thin_linear.thin_fp8(X[:4], FP8, ROWS, BIAS)),
    "thin_fp4_most": (
        "sagewan.thin",
        lambda: thin_linear.thin_nvfp4(X[:4], DATA, SCALE, ONE, SHAPE, None),
    ),
}
SMS = {row.name: row.sms for row in LINEAR_ROWS} | {"sagewan.hopper": (90,)}
# Other forms of a kernel that is compiled for every architecture.
FORMS = (
    "quantize_gelu", "norm_fp8", "add", "as_it_is_fp8", "rms", "thin_fp8_most", "thin_fp4_most",
)  # fmt: skip
CELLS = [(name, sm) for name, (row, _) in LAUNCHERS.items() for sm in (80, 89, 90, 100, 120)
         if sm in SMS[row] and (sm == 90 or name not in FORMS)]  # fmt: skip

# Bytes that one version of Triton spills a thread: two registers of a pass that waits for memory.
SPILLED = {("3.8", "rms", 90): 8}


@pytest.mark.parametrize(("name", "sm"), CELLS)
def test_it_compiles_and_keeps_its_values_in_registers(name: str, sm: int) -> None:
    (launch,) = record(sm, LAUNCHERS[name][1])
    kernel = build(launch, sm)
    assert kernel.shared <= SHARED_MEMORY[86 if sm == 80 else sm]
    version = triton.__version__.rpartition(".")[0]
    assert kernel.spilled == SPILLED.get((version, name, sm), 0)
    assert not kernel.products()
    thin = name.startswith("thin")
    if thin or name in ("to_fp8", "to_16"):
        # No value changes its thread, but that the warps' last sums meet in shared memory.
        assert kernel.shared <= (512 if thin else 0)
        assert ("ld.global.v4.b32" if thin else "st.global.v") in kernel.ptx
    if name.startswith("quantize") or (name.endswith("fp8") and not thin):
        assert "cvt.rn.satfinite.e4m3x2" in kernel.ptx
