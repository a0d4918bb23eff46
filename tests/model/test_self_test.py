"""The self-test of the rows for quantised weights passes what is right and catches what is not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.model import matmul
from sagewan.model.self_test import self_test
from sagewan.plan.linear import LINEAR_ROWS
from sagewan.reference import formats
from tests.machines import CPU

ROWS = {row.name: row for row in LINEAR_ROWS}
EMULATED = ("emulated.fp8", "emulated.nvfp4")


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_right_passes_and_is_no_better_than_its_format(name: str, dtype: str) -> None:
    test = self_test(ROWS[name], CPU, dtype)
    assert test.passed
    assert test.error
    assert test.limit / 3 < test.error < test.limit


def per_tensor(x: Any, packed: Any, bias: Any) -> Any:
    """One scale for all rows: what the small ones hold is lost."""
    step = x.float().abs().amax() / 448
    rounded = (x.float() / step).to(torch.float8_e4m3fn).float() * step
    return matmul.unpacked(rounded, packed, bias.float())


def without_bias(x: Any, packed: Any, bias: Any) -> Any:
    return matmul.unpacked(x, packed, None)


def first_scale_for_all(x: Any, packed: Any, bias: Any) -> Any:
    return torch.nn.functional.linear(
        x.float(), packed.data.float() * packed.scale[0], bias.float()
    )


def fails(x: Any, packed: Any, bias: Any) -> Any:
    raise RuntimeError("not built for this GPU")


def nan(x: Any, packed: Any, bias: Any) -> Any:
    return matmul.unpacked(x, packed, bias) * torch.nan


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (per_tensor, "self-test-error"),
        (without_bias, "self-test-error"),
        (first_scale_for_all, "self-test-error"),
        (nan, "self-test-not-finite"),
        (fails, "self-test-crashed"),
    ],
)
def test_what_is_wrong_is_caught(function: Any, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "emulated_fp8", function)
    test = self_test(ROWS["emulated.fp8"], CPU, "float32")
    assert test.objection
    assert test.objection.code == code


def added(x: Any, packed: Any, bias: Any, gate: Any) -> Any:
    return gate * matmul.unpacked(x.data.float() * x.scale, packed, bias.float())


def without_gate(x: Any, packed: Any, bias: Any, gate: Any) -> Any:
    return added(x, packed, bias, torch.ones_like(gate))


def bias_without_gate(x: Any, packed: Any, bias: Any, gate: Any) -> Any:
    return added(x, packed, 0 * bias, gate) + bias


@pytest.mark.parametrize(
    ("product", "passes"), [(added, True), (without_gate, False), (bias_without_gate, False)]
)
def test_a_product_that_is_added_is_tested_too(
    product: Any, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(x: Any, packed: Any, bias: Any, gate: Any, into: Any) -> None:
        into.copy_(into.float() + product(x, packed, bias, gate.values))

    monkeypatch.setattr(matmul, "add_fp8_rows", add)
    row = replace(ROWS["emulated.fp8"], adds="sagewan.model.matmul:add_fp8_rows")
    test = self_test(row, CPU, "bfloat16")
    assert test.passed is passes, test


@pytest.mark.parametrize(("spoilt", "passes"), [(1.0, True), (1.1, False)])
def test_a_product_through_gelu_is_tested_too(
    spoilt: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def through(x: Any, packed: Any, bias: Any, known: Any) -> Any:
        assert known == {}
        assert x.norm.shape == x.scale.shape
        product = added(x, packed, bias, torch.ones(()))
        made = formats.e4m3_per_row(F.gelu(product, approximate="tanh"))
        return Fp8Rows(made.data.to(torch.float8_e4m3fn), made.scale * spoilt)

    monkeypatch.setattr(matmul, "gelu_fp8_rows", through)
    row = replace(ROWS["emulated.fp8"], gelu="sagewan.model.matmul:gelu_fp8_rows")
    test = self_test(row, CPU, "bfloat16")
    assert test.passed is passes, test


def test_memory_that_ran_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: Any, packed: Any, bias: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(matmul, "emulated_fp8", full)
    with pytest.raises(torch.OutOfMemoryError):
        self_test(ROWS["emulated.fp8"], CPU, "float32")
