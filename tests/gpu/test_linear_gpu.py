"""Quantised layers on a GPU: every row that it can run, what is called in it, and how it fails."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sagewan.checkpoint import kitchen
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.quantize import pack
from sagewan.kernels import nvfp4_unpack
from sagewan.kernels.fp8_linear import quantize_rows
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.model import matmul
from sagewan.model.self_test import self_test
from sagewan.pipeline import generate
from sagewan.pipeline.probe import probe
from sagewan.plan.linear import LINEAR_ROWS, LinearRow
from sagewan.plan.request import Request

pytestmark = pytest.mark.gpu


def rows_here() -> Iterator[LinearRow]:
    if torch.cuda.is_available():
        hardware = probe()
        device = hardware.device("cuda")
        rows = (row for row in LINEAR_ROWS if not row.trusted)
        yield from (row for row in rows if not any(row.needs("bfloat16", device, hardware)))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("row", list(rows_here()), ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_row_that_runs_here_passes_its_self_test(row: LinearRow, dtype: str) -> None:
    if dtype not in row.dtypes:
        pytest.skip(f"takes {row.dtypes}")
    test = self_test(row, probe().device("cuda"), dtype)
    assert test.passed, test


@pytest.mark.parametrize("tokens", [1, 4, 16, 333, 4096])
@pytest.mark.parametrize(
    ("format_", "function", "most"),
    [
        ("float8_e4m3fn", matmul.fp8_rows, 0.035),
        ("nvfp4", matmul.fp8_rows_of_nvfp4, 0.045),
        ("nvfp4", matmul.nvfp4_unpacked, 0.005),
        ("float8_e4m3fn", matmul.unpacked, 0.005),
        ("nvfp4", matmul.unpacked, 0.005),
        ("float8_e4m3fn", matmul.thin, 0.005),
        ("nvfp4", matmul.thin, 0.005),
    ],
)
def test_products_are_those_of_the_stored_weight(
    tokens: int, format_: str, function: Any, most: float
) -> None:
    if function is matmul.thin and tokens > 4:
        pytest.skip("for a few rows")
    if format_ == "float8_e4m3fn" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    x, weight, bias = random(tokens, 1536), random(8960, 1536) / 40, random(8960)
    packed = pack(weight, format_)
    exact = F.linear(x.double(), unpack(packed, torch.float64), bias.double())
    error = (function(x, packed, bias).double() - exact).norm() / exact.norm()
    assert float(error) < most


def test_fp4_is_unpacked_as_comfy_kitchen_does() -> None:
    weight = random(1536, 8960) / 90
    data, scale, tensor_scale = kitchen.quantize_nvfp4(weight)
    shape = (1536, 8960)
    exact = kitchen.unpack_nvfp4(data, scale, tensor_scale)
    found = nvfp4_unpack.unpack_16(data, scale, tensor_scale, shape, torch.bfloat16)
    assert torch.allclose(found.float(), exact, rtol=2**-7, atol=0)
    on_the_host = kitchen.unpack_nvfp4(data.cpu(), scale.cpu(), tensor_scale.cpu())
    assert exact.cpu().equal(on_the_host) or torch.allclose(exact.cpu(), on_the_host, rtol=1e-6)
    there, *_ = kitchen.quantize_nvfp4(weight.cpu())
    assert (there != data.cpu()).float().mean() < 0.01


@pytest.mark.parametrize("format_", ["float8_e4m3fn", "nvfp4"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_few_rows_from_any_place_in_memory(format_: str, count: int) -> None:
    weight, bias = random(1536, 8960) / 90, random(1536)
    packed = pack(weight, format_)
    stored = unpack(packed, torch.float64)
    # Each twice, the second time by what was compiled before; also where 16 bytes can't be read at
    # once, between two that can.
    apart = random(count * 8960 + 1)[1:].view(count, 8960)
    for x in (random(count, 8960), apart, -random(count, 8960), apart):
        exact = F.linear(x.double(), stored, bias.double())
        found = matmul.thin(x, packed, bias)
        assert found.equal(matmul.thin(x, packed, bias))
        assert float((found.double() - exact).norm() / exact.norm()) < 0.005


class Called(TorchDispatchMode):
    """Notes every operation that reaches torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "mv", "_int_mm"}


@pytest.mark.parametrize(
    ("format_", "function"),
    [("float8_e4m3fn", matmul.fp8_rows), ("nvfp4", matmul.fp8_rows_of_nvfp4)],
)
def test_the_fp8_path_calls_no_16_bit_product(format_: str, function: Any) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    x, weight, bias = random(512, 1536), random(2048, 1536), random(2048)
    packed = pack(weight, format_)
    function(x, packed, bias)
    with Called() as called:
        function(x, packed, bias)
    assert "_scaled_mm" in called.names
    assert not PRODUCTS & set(called.names), called.names
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function(x, packed, bias)
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages()]
    assert not [name for name in kernels if "bf16bf16" in name or "bf16_bf16_bf16" in name], kernels
    with Called() as called:  # The check can fail.
        matmul.unpacked(x, packed, bias)
    assert PRODUCTS & set(called.names), called.names


def test_memory_that_runs_out_in_the_fp8_path_is_raised() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    x, weight = random(4096, 1536), random(65536, 1536)
    packed = pack(weight, "float8_e4m3fn")
    matmul.fp8_rows(x[:16], packed, None)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Room for the input in FP8, none for the output of 537 MB.
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_allocated() + 100 * 2**20) / total
    )
    try:
        with pytest.raises(torch.OutOfMemoryError), Called() as called:
            matmul.fp8_rows(x, packed, None)
        assert not PRODUCTS & set(called.names), called.names
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("first", [1, 24, 47])
def test_tokens_of_a_longer_sequence_are_multiplied(first: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    packed, rows = pack(random(384, 384), "float8_e4m3fn"), quantize_rows(random(70, 384))
    part = Fp8Rows(rows.data[first:], rows.scale[first:])
    expected = matmul.fp8_rows(rows, packed, None)[first:].float()
    found = matmul.fp8_rows(part, packed, None).float()
    assert float((found - expected).norm() / expected.norm()) < 0.005


@pytest.mark.parametrize(
    ("format_", "plain", "adding"),
    [
        ("float8_e4m3fn", matmul.fp8_rows, matmul.add_fp8_rows),
        ("nvfp4", matmul.fp8_rows_of_nvfp4, matmul.add_fp8_rows_of_nvfp4),
    ],
)
@pytest.mark.parametrize(
    ("rows", "sides"), [(1000, (1536, 2048)), (77, (256, 528)), (16380, (5120, 5120))]
)
def test_a_product_added_is_the_product_and_the_sum(
    format_: str, plain: Any, adding: Any, rows: int, sides: tuple[int, int]
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuBLASLt adds them on Hopper")
    x, weight, bias = random(rows, sides[0]), random(sides[1], sides[0]), random(sides[1])
    packed, before = pack(weight, format_), random(rows + 3, sides[1])
    gate = torch.linspace(-1, 1, sides[1], device=before.device)
    quantised = quantize_rows(x)
    for own_bias, own_gate in ((bias, gate), (bias, None), (None, gate)):
        product = plain(x, packed, own_bias).float()
        expected = before[1:-2].float() + (product if own_gate is None else product * own_gate)
        into = before.clone()
        # From a token that begins no 16 bytes of scales.
        adding(
            Fp8Rows(quantised.data[1:], quantised.scale[1:]),
            packed,
            own_bias,
            matmul.Gate(own_gate),
            into[2:-2],
        )
        assert into[:2].equal(before[:2])
        assert into[-2:].equal(before[-2:])
        change = (into[2:-2].float() - expected[1:]).norm() / (expected - before[1:-2]).norm()
        assert float(change) < 0.01


def test_threads_that_add_the_same_products_shape_add_each_its_own() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuBLASLt adds them on Hopper")
    x = quantize_rows(random(64, 512))
    # Scales and biases, which are told by pointers, are all that differ.
    cases = [(random(1024, 512) * 4.0**i, random(1024) * 4.0**i) for i in range(4)]
    packed = [pack(weight, "float8_e4m3fn") for weight, _ in cases]

    def added(case: int) -> torch.Tensor:
        into = torch.zeros(64, 1024, dtype=torch.bfloat16, device="cuda")
        matmul.add_fp8_rows(x, packed[case], cases[case][1], matmul.Gate(None), into)
        return into.cpu()

    alone = [added(case) for case in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for case, found in enumerate(pool.map(added, [0, 1, 2, 3] * 50)):
            assert found.equal(alone[case % 4])


@pytest.mark.parametrize(
    ("format_", "plain", "through"),
    [
        ("float8_e4m3fn", matmul.fp8_rows, matmul.gelu_fp8_rows),
        ("nvfp4", matmul.fp8_rows_of_nvfp4, matmul.gelu_fp8_rows_of_nvfp4),
    ],
)
@pytest.mark.parametrize(
    ("rows", "sides"),
    [(1000, (1536, 8960)), (77, (256, 528)), (16380, (5120, 13824)), (1, (256, 272))],
)
def test_a_product_through_gelu_is_the_product_and_a_pass(
    format_: str, plain: Any, through: Any, rows: int, sides: tuple[int, int]
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    x, weight, bias = random(rows, sides[0]), random(sides[1], sides[0]) / 20, random(sides[1])
    packed, quantised = pack(weight, format_), quantize_rows(x)
    lengths = x.float().norm(dim=1, keepdim=True)
    for own_bias in (bias, None):
        product = plain(quantised, packed, own_bias)
        exact = F.gelu(product.float(), approximate="tanh")
        usual = quantize_rows(product, gelu=True)
        known: dict[torch.device, Tensor] = {}
        for _ in range(2):
            found = through(
                Fp8Rows(quantised.data, quantised.scale, lengths), packed, own_bias, known
            )
        assert list(known) == [x.device]
        errors = [
            float((one.data.float() * one.scale - exact).norm() / exact.norm())
            for one in (found, usual)
        ]
        assert errors[0] < 1.1 * errors[1] + 0.002, errors


@pytest.mark.parametrize("quantization", ["fp8_scaled", "fp4_scaled"])
def test_a_run_multiplies_as_planned(quantization: str, tmp_path: Path) -> None:
    request = Request(
        prompt="a red ball rolls to the right",
        output=tmp_path / "a.mp4",
        quantization=quantization,
        steps=4,
        seed=1,
    )
    weights = generate(request).report["weights"]
    assert weights["format"] == {"fp8_scaled": "float8_e4m3fn", "fp4_scaled": "nvfp4"}[quantization]
    names = {row["implementation"] for row in weights["compute"]}
    if torch.cuda.get_device_capability() == (9, 0):
        formats = {"fp8_scaled": "", "fp4_scaled": "_of_nvfp4"}
        low = f"sagewan.fp8_rows_hopper{formats[quantization]}"
        assert low in names
        for how in ("added to the residual", "through GELU to fp8"):
            rows = [row for row in weights["compute"] if how in row["compute"]]
            assert {row["implementation"] for row in rows} == {low}


@pytest.mark.parametrize("measured", [False, True])
def test_a_weight_on_the_gpu_is_packed_as_on_the_host(measured: bool) -> None:
    weight = random(256, 512)
    known = random(8, 512) / 4 if measured else None
    for format_ in ("float8_e4m3fn", "nvfp4"):
        here = pack(weight, format_, directions=known)
        there = pack(weight.cpu(), format_, directions=None if known is None else known.cpu())
        assert isinstance(here, Packed)
        a, b = unpack(here, torch.float32).cpu(), unpack(there, torch.float32)
        assert float((a - b).norm() / b.norm()) < 0.01
