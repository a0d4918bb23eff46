"""The linear layers' kernels, run by Triton's interpreter: ``test_interpreted`` starts it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.checkpoint import kitchen
from sagewan.errors import ShapeError
from sagewan.kernels import fp8_linear, nvfp4_unpack, thin_linear
from sagewan.reference import formats
from tests.kernels.interpreted import _exact_e4m3  # noqa: F401 a fixture for every test here


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [16, 100, 256])
def test_rows_are_quantised_as_the_reference_does(columns: int) -> None:
    x = (random(7, columns) * torch.logspace(-3, 3, 7)[:, None]).half()
    x[3] = 0
    found = fp8_linear.quantize_rows(x)
    expected = formats.e4m3_per_row(x)
    assert torch.allclose(found.scale, expected.scale, rtol=1e-6)
    assert found.data.float().equal(expected.data)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_so() -> None:
    x = random(3, 64).half()
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    found = fp8_linear.quantize_rows(x)
    finite = (found.data.float() * found.scale).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


def test_rows_too_small_for_a_scale_are_zeros() -> None:
    x = torch.zeros(2, 256)
    x[0, 3], x[1, 5] = 1e-37, 1e-20
    found = fp8_linear.quantize_rows(x)
    assert (found.data.float() * found.scale).equal(x * torch.tensor([[0.0], [1.0]]))


def nvfp4(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = random(rows, columns, seed=1) * 0.05
    weight[0, :16] = 0
    return weight, *kitchen.quantize_nvfp4(weight)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (144, 272)])
def test_fp4_weights_are_unpacked_to_the_bit(rows: int, columns: int) -> None:
    _, data, scale, tensor_scale = nvfp4(rows, columns)
    expected = kitchen.unpack_nvfp4(data, scale, tensor_scale)
    found = nvfp4_unpack.unpack_16(data, scale, tensor_scale, (rows, columns), torch.float16)
    # The scales may be multiplied in another order: a last bit of float16.
    assert torch.allclose(found.float(), expected, rtol=2**-10, atol=1e-7)
    small = nvfp4_unpack.unpack_e4m3(data, scale, (rows, columns)).float()
    exact = (expected / tensor_scale / nvfp4_unpack.E4M3_STEPS).to(torch.float8_e4m3fn).float()
    assert small.equal(exact)


@pytest.mark.parametrize(
    ("count", "outputs", "columns", "native"),
    [(1, 144, 272, False), (2, 16, 1040, True), (3, 48, 272, True)],
)
def test_few_rows(
    count: int, outputs: int, columns: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both ways to read e4m3: by its bits, and as hardware of 8.9 and newer does.
    monkeypatch.setattr(thin_linear, "compute_capability", lambda _: 89 if native else 80)
    x, bias = random(count, columns).half(), random(outputs).half()
    weight, data, scale, tensor_scale = nvfp4(outputs, columns)
    shape = (outputs, columns)
    found = thin_linear.thin_nvfp4(x, data, scale, tensor_scale, shape, bias)
    stored = kitchen.unpack_nvfp4(data, scale, tensor_scale)
    expected = F.linear(x.float(), stored, bias.float())
    assert (found.float() - expected).norm() / expected.norm() < 1e-3
    steps = weight.abs().amax(1, keepdim=True) / 448
    small = (weight / steps).to(torch.float8_e4m3fn)
    found = thin_linear.thin_fp8(x, small, steps, None)
    expected = F.linear(x.float(), small.float() * steps)
    assert (found.float() - expected).norm() / expected.norm() < 1e-3


def test_what_the_kernels_do_not_take_is_refused() -> None:
    _, data, scale, tensor_scale = nvfp4(48, 272)
    with pytest.raises(ShapeError, match="multiples of 16"):
        nvfp4_unpack.unpack_16(data, scale, tensor_scale, (40, 272), torch.float16)
    with pytest.raises(ShapeError, match="5 rows"):
        thin_linear.thin_nvfp4(random(5, 272).half(), data, scale, tensor_scale, (48, 272), None)
    with pytest.raises(ShapeError, match="columns"):
        fp8_linear.quantize_rows(torch.empty(1, 70000))
