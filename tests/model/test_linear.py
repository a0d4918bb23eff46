"""Quantised layers: the same numbers by every way to multiply, and all their tensors move."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sagewan.checkpoint.lora import LoraLayer
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.quantize import pack, relative_error
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.model import matmul
from sagewan.model.linear import Multiplier, QuantLinear, matrices
from sagewan.model.lora import Adapters
from sagewan.model.matmul import Gate
from sagewan.plan.evidence import Evidence
from sagewan.plan.linear import THIN_ROWS
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from tests.loras import pairs
from tests.machines import DEMO, machine
from tests.shrunken import transformer

FORMATS = ("float8_e4m3fn", "nvfp4")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(format_: str, dtype: torch.dtype = torch.float32) -> tuple[QuantLinear, torch.Tensor]:
    weight, bias = random(48, 80) / 9, random(48, seed=1)
    packed = pack(weight, format_)
    quantised = QuantLinear(packed, bias, dtype)
    return quantised, unpack(packed, torch.float32)


@pytest.mark.parametrize(("format_", "most"), [("float8_e4m3fn", 0.03), ("nvfp4", 0.12)])
def test_how_near_the_formats_are(format_: str, most: float) -> None:
    weight = random(256, 512) / 20
    assert relative_error(pack(weight, format_), weight) < most
    assert relative_error(pack(weight.bfloat16(), format_), weight.bfloat16()) < most


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_product_with_what_is_stored(format_: str, dtype: torch.dtype) -> None:
    quantised, stored = layer(format_, dtype)
    x = random(2, 5, 80, seed=2).to(dtype)
    expected = F.linear(x.float(), stored, random(48, seed=1).to(dtype).float())
    out = quantised(x)
    assert (out.dtype, out.shape) == (dtype, (2, 5, 48))
    assert (out.float() - expected).norm() / expected.norm() < (
        1e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize(("shared", "whole"), [(True, True), (True, False), (False, True)])
def test_what_is_added_to_a_batch_is_added_at_once_where_it_can_be(
    shared: bool, whole: bool
) -> None:
    quantised, stored = layer("float8_e4m3fn")
    calls = []

    def add(x: Fp8Rows, packed: Packed, bias: Any, gate: Gate, into: torch.Tensor) -> None:
        calls.append(into.shape)
        into += gate.values * F.linear(
            x.data.float() * x.scale, unpack(packed, torch.float32), bias
        )

    quantised.multiply_add = add
    data = random(2, 5, 80, seed=2).to(torch.float8_e4m3fn)
    rows = Fp8Rows(data, random(2, 5, 1, seed=3).abs())
    gate = random(1 if shared else 2, 48, seed=4)
    sequence = random(2, 9, 48, seed=5)
    into = sequence.clone()[:, 2:7] if not whole else sequence[:, 2:7].clone()
    product = F.linear(data.float() * rows.scale, stored, random(48, seed=1))
    quantised.add_of_fp8(rows, list(map(Gate, gate)), into)
    expected = sequence[:, 2:7] + gate[:, None] * product
    assert torch.allclose(into, expected, atol=1e-4)
    assert calls == [(10, 48)] if shared and whole else [(5, 48)] * 2


@pytest.mark.parametrize(
    ("format_", "function", "most"),
    [
        ("float8_e4m3fn", matmul.emulated_fp8, 0.04),
        ("nvfp4", matmul.emulated_nvfp4, 0.12),
    ],
)
def test_low_precision_rounds_the_input_too(format_: str, function: Any, most: float) -> None:
    quantised, stored = layer(format_)
    x = random(64, 80, seed=2)
    exact = F.linear(x, stored, quantised.bias)
    error = (function(x, quantised.packed, quantised.bias) - exact).norm() / exact.norm()
    assert most / 10 < error < most


def test_the_input_factor_comes_before_the_product() -> None:
    factor = random(80, seed=3).abs()
    packed = pack(random(48, 80), "float8_e4m3fn")
    scaled = QuantLinear(Packed(**{**packed.__dict__, "pre_scale": factor}), None, torch.float32)
    x = random(3, 80, seed=2)
    plain = QuantLinear(packed, None, torch.float32)
    assert torch.allclose(scaled(x), plain(x * factor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_", FORMATS)
def test_dtypes_of_the_packed_tensors_survive_any_move(format_: str) -> None:
    quantised, _ = layer(format_)
    before = {name: x.dtype for name, x in quantised.named_buffers()}
    whole = nn.Sequential(quantised).to(torch.bfloat16)
    assert {name: x.dtype for name, x in quantised.named_buffers()} == before
    assert quantised.bias.dtype == torch.bfloat16
    whole.to("meta")
    assert {x.device.type for x in (*whole.parameters(), *whole.buffers())} == {"meta"}


def test_what_stands_for_the_weight_can_not_be_taken_for_it() -> None:
    quantised, _ = layer("nvfp4", torch.bfloat16)
    assert isinstance(quantised, nn.Linear)
    assert quantised.weight.shape == (48, 80)
    assert quantised.weight.dtype == torch.bfloat16
    assert F.linear(random(2, 80).bfloat16(), quantised.weight).isnan().all()
    assert "weight" not in dict(quantised.named_parameters())
    assert matrices(nn.Sequential(quantised, nn.Linear(2, 2))) == {"nvfp4": 1, "float32": 1}


def quantised_model(format_: str) -> Any:
    model = transformer("wan2.1-t2v-1.3b", 3).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            packed = pack(module.weight, format_)
            model.set_submodule(name, QuantLinear(packed, module.bias, torch.float32))
    return model


def plan_of(**fields: Any) -> Any:
    request = Request(prompt="a red ball", quantization="fp8_scaled", **fields)
    return make_plan(request, DEMO, machine(), Evidence()).weights


def test_the_plan_says_what_multiplies_where_and_calls_are_counted() -> None:
    model = quantised_model("float8_e4m3fn")
    multiplier = Multiplier()
    multiplier.install(model, plan_of(emulate=True))
    x = random(4, 256)
    model.blocks[0].attn1.to_q(x)
    model.blocks[0].ffn.net[0].proj(x)
    model.blocks[0].attn2.to_k(x)
    assert multiplier.ran() == [
        {
            "implementation": "emulated.fp8",
            "format": "float8_e4m3fn",
            "compute": "fp8 e4m3 × fp8 e4m3",
            "calls": 2,
        },
        {
            "implementation": "torch.unpacked",
            "format": "float8_e4m3fn",
            "compute": "unpacked before the product",
            "calls": 1,
        },
    ]


def test_a_file_may_want_16_bit() -> None:
    model = quantised_model("float8_e4m3fn")
    model.blocks[0].attn1.to_q.full_precision = True
    multiplier = Multiplier()
    multiplier.install(model, plan_of(emulate=True))
    model.blocks[0].attn1.to_q(random(4, 256))
    assert [row["implementation"] for row in multiplier.ran()] == ["torch.unpacked"]


def test_another_function_in_a_rows_place_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def impostor(x: Any, packed: Any, bias: Any) -> Any:
        return matmul.unpacked(x, packed, bias)

    monkeypatch.setattr(matmul, "emulated_fp8", impostor)
    model, multiplier = quantised_model("float8_e4m3fn"), Multiplier()
    multiplier.install(model, plan_of(emulate=True))
    model.blocks[0].attn1.to_q(random(4, 256))
    (ran,) = multiplier.ran()
    assert "impostor" in ran["implementation"]


@pytest.mark.parametrize("format_", FORMATS)
def test_a_lora_adds_the_same_beside_every_format(format_: str) -> None:
    model = quantised_model(format_)
    lora = {name: LoraLayer(a=a, b=b) for name, (a, b) in pairs(model).items()}
    x = random(3, 256)
    target = model.blocks[1].ffn.net[0].proj
    before = target(x)
    Adapters(model).put([lora])
    a, b = pairs(model)["blocks.1.ffn.net.0.proj"]
    assert torch.allclose(target(x) - before, x @ a.T @ b.T, atol=1e-4)


def test_scales_are_read_where_16_bytes_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLASLt refuses others, and a chunk of tokens may begin anywhere."""
    given: list[torch.Tensor] = []

    def product(x: torch.Tensor, weight: torch.Tensor, **scales: Any) -> torch.Tensor:
        given.append(scales["scale_a"])
        return torch.empty(len(x), weight.shape[1])

    monkeypatch.setattr(torch, "_scaled_mm", product)
    rows = Fp8Rows.empty(1, 12, 32, device=torch.device("cpu"))
    rows.scale.copy_(torch.arange(12.0).view(1, 12, 1))
    weight = torch.empty(16, 32, dtype=torch.float8_e4m3fn)
    for start in (0, 4, 7):
        x = rows.tokens(start, start + 3)
        matmul.product_of_rows(Fp8Rows(x.data[0], x.scale[0]), weight, torch.ones(16, 1), None)
        assert given[-1].data_ptr() % 16 == 0
        assert given[-1].flatten().tolist() == [start, start + 1, start + 2]


def test_the_plan_gives_the_few_row_kernel_no_more_rows_than_it_takes() -> None:
    thin = pytest.importorskip("sagewan.kernels.thin_linear", exc_type=ImportError)
    assert thin.MAX_ROWS == THIN_ROWS
