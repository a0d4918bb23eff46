"""Rounding by the inputs: what is lost of them is less, and the format is the same."""

import pytest
import torch
from torch import Tensor

from sagewan.checkpoint import compensate
from sagewan.checkpoint.packed import Packed, unpack
from sagewan.checkpoint.quantize import pack, relative_error

FORMATS = ("float8_e4m3fn", "nvfp4")


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, columns: int) -> Tensor:
    """Rows with a mean, a few directions in which they differ, and a little of everything."""
    mean = made(columns, seed=1) * torch.linspace(0.1, 2, columns)
    ways = made(3, columns, seed=2)
    return mean + made(count, 3, seed=3) @ ways + 0.5 * made(count, columns, seed=4)


def directions(rows: Tensor, count: int = 8) -> Tensor:
    rows = rows / rows.square().mean().sqrt()
    _, sizes, ways = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
    return sizes[:count, None] * ways[:count]


def lost(packed: Packed, weight: Tensor, rows: Tensor) -> float:
    exact = rows @ weight.T
    return float((rows @ unpack(packed, torch.float32).T - exact).norm() / exact.norm())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", [(48, 256), (33, 200), (16, 16)])
def test_less_is_lost_of_such_inputs_and_hardly_more_of_the_weight(
    format_: str, shape: tuple[int, int]
) -> None:
    weight = made(*shape) * 0.02
    rows = inputs(500, shape[1])
    known = directions(rows[:400]).to(torch.float8_e4m3fn)
    nearest, own = pack(weight, format_), pack(weight, format_, directions=known)
    # Others than those that it goes by.
    before, after = lost(nearest, weight, rows[400:]), lost(own, weight, rows[400:])
    assert after < (0.75 if shape[1] > 16 else 1) * before, (before, after)
    most = 1.2 if shape[1] > 16 else 1.4
    assert relative_error(own, weight) < most * relative_error(nearest, weight)


@pytest.mark.parametrize("format_", FORMATS)
def test_the_format_and_its_scales_are_the_same(format_: str) -> None:
    weight = made(40, 144) * 0.02
    nearest = pack(weight, format_)
    own = pack(weight, format_, directions=directions(inputs(50, 144)))
    for name, tensor in nearest.tensors.items():
        other = own.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        if name != "data":
            assert tensor.float().equal(other.float()), name
    assert not own.data.view(torch.uint8).equal(nearest.data.view(torch.uint8))


@pytest.mark.parametrize("format_", FORMATS)
def test_nothing_known_of_the_inputs_is_the_nearest(format_: str) -> None:
    weight = made(32, 96)
    own = pack(weight, format_, directions=torch.zeros(8, 96))
    nearest = pack(weight, format_)
    assert own.data.view(torch.uint8).equal(nearest.data.view(torch.uint8))


def test_weights_that_the_format_holds_stay_as_they_are() -> None:
    weight = torch.tensor([448.0, 2, -3, 0.5, -448, 7, 0, 13]).repeat(16, 8)
    own = pack(weight, "float8_e4m3fn", directions=directions(inputs(50, 64)))
    assert unpack(own, torch.float32).equal(weight)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_few_inputs_that_are_all_alike_bend_no_weight_far(format_: str) -> None:
    """Where the directions hold all there is, nothing else would hold the columns back."""
    weight = made(64, 128) * 0.02
    alike = made(1, 128).expand(40, 128) + 1e-4 * made(40, 128, seed=5)
    own = pack(weight, format_, directions=directions(alike))
    assert relative_error(own, weight) < 1.2 * relative_error(pack(weight, format_), weight)


def test_columns_in_one_turn_lose_no_more_than_in_turns_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, rows = made(64, 512) * 0.02, inputs(600, 512)
    found = {}
    for turns in (64, 512):
        monkeypatch.setattr(compensate, "TURNS", turns)
        own = pack(weight, "float8_e4m3fn", directions=directions(rows))
        found[turns] = lost(own, weight, rows)
    assert max(found.values()) < 1.05 * min(found.values()), found
