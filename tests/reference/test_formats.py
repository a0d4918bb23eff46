"""Number formats bit for bit: against their tables, another implementation, and by properties."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagewan.reference import formats
from tests.inputs import normal

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e4m3_values() -> torch.Tensor:
    """All finite values of e4m3, from their 256 bit patterns."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize(
    ("x", "rounded"),
    # Ties go to the value whose last bit is 0: 0, 1, 2, 4.
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (5.01, 6), (99, 6)],
)
def test_e2m1_rounds_ties_to_even_and_saturates(x: float, rounded: float) -> None:
    assert formats.e2m1(torch.tensor([x, -x])).tolist() == [rounded, -rounded]


def test_e2m1_takes_the_nearest_value() -> None:
    x = torch.linspace(-6, 6, 4801)
    grid = torch.cat((-E2M1.flip(0), E2M1))
    nearest = (x[:, None] - grid).abs().amin(1)
    torch.testing.assert_close((formats.e2m1(x) - x).abs(), nearest)


@pytest.mark.parametrize("rows", [1, 8])
def test_int8_rounded_along_has_less_error_of_its_own_direction(rows: int) -> None:
    x = normal(512, 128, seed=3)
    errors = [formats.int8(x, rows, along=along).value() - x for along in (False, True)]
    plain, along = ((e * x).sum(-1).norm() for e in errors)
    assert along < 0.5 * plain
    assert errors[1].norm() < 1.02 * errors[0].norm()


def test_e4m3_keeps_its_own_values_and_saturates() -> None:
    values = e4m3_values()
    assert torch.equal(formats.e4m3(values), values)
    assert formats.e4m3(torch.tensor([449.0, -1e9, 2**-10, 3 * 2**-10])).tolist() == [
        448.0,
        -448.0,
        0.0,  # half the smallest: a tie, to even
        2 * 2**-9,
    ]


def test_e4m3_takes_the_nearest_value() -> None:
    values = e4m3_values()
    x = torch.cat((normal(2000), 100 * normal(2000, seed=1), 0.01 * normal(2000, seed=2)))
    nearest = (x[:, None] - values).abs().amin(1)
    torch.testing.assert_close((formats.e4m3(x) - x).abs(), nearest)


@given(
    rows=st.integers(1, 40),
    block=st.sampled_from([1, 16, 64]),
    size=st.floats(1e-20, 1e20),
    seed=st.integers(0, 100),
)
def test_int8_is_within_half_a_step_in_every_block(
    rows: int, block: int, size: float, seed: int
) -> None:
    x = normal(2, rows, 8, seed=seed) * size
    scaled = formats.int8(x, block)
    assert scaled.data.abs().max() <= 127
    assert torch.equal(scaled.data, scaled.data.round())
    assert ((scaled.value() - x).abs() <= scaled.scale * 0.5001).all()
    for start in range(0, rows, block):
        part = slice(start, start + block)
        largest = x[:, part].abs().amax((1, 2))
        torch.testing.assert_close(scaled.scale[:, part].amax((1, 2)) * 127, largest)


def test_zeros_stay_zeros_in_every_format() -> None:
    zeros = torch.zeros(1, 5, 48)
    for scaled in (formats.int8(zeros, 2), formats.e4m3_per_channel(zeros), formats.nvfp4(zeros)):
        assert torch.equal(scaled.value(), zeros)


def test_e4m3_per_channel_uses_the_whole_range_of_each_channel() -> None:
    x = normal(1, 100, 4) * torch.tensor([1e-6, 1.0, 50.0, 1e6])
    scaled = formats.e4m3_per_channel(x)
    assert scaled.data.abs().amax(-2).tolist() == [[448.0] * 4]
    assert ((scaled.value() - x).norm(dim=1) / x.norm(dim=1)).max() < 0.04


def test_nvfp4_is_that_of_comfy_kitchen_bit_for_bit() -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor", exc_type=ImportError)
    x = normal(64, 128) * torch.exp(normal(64, 1, seed=1))
    stored, params = kitchen.TensorCoreNVFP4Layout.quantize(x)
    theirs = kitchen.TensorCoreNVFP4Layout.dequantize(stored, params)
    assert torch.equal(formats.nvfp4(x).value(), theirs)


def test_nvfp4_values_and_scales_exist_in_their_formats() -> None:
    scaled = formats.nvfp4(normal(3, 7, 50), torch.tensor(2**-7))
    assert set(scaled.data.abs().unique().tolist()) <= set(E2M1.tolist())
    assert torch.isin(scaled.scale * 2**7, e4m3_values()).all()
    assert scaled.data.shape == (3, 7, 50)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_rotation_keeps_products_and_spreads_an_outlier(head_dim: int) -> None:
    q, k = normal(5, head_dim), normal(6, head_dim, seed=1)
    torch.testing.assert_close(
        formats.rotate(q) @ formats.rotate(k).mT, q @ k.mT, atol=1e-4, rtol=1e-4
    )
    outlier = torch.zeros(head_dim)
    outlier[3] = 1.0
    assert formats.rotate(outlier).abs().max() < 0.2


@pytest.mark.parametrize("size", [8, 32, 64, 128])
def test_rotation_spreads_a_constant_row_and_every_walsh_function(size: int) -> None:
    rows = torch.cat((torch.ones(1, size), formats.hadamard(size) * size**0.5))
    assert formats.rotate(rows).abs().max() <= 2**0.5 + 1e-5


def test_hadamard_is_orthonormal_and_its_signs_are_sylvesters() -> None:
    matrix = formats.hadamard(16)
    torch.testing.assert_close(matrix @ matrix, torch.eye(16))
    for i, j in itertools.product(range(16), repeat=2):
        assert (matrix[i, j] < 0) == ((i & j).bit_count() % 2 == 1)
