"""Block scales that lose least: never more than the usual ones, in the same format."""

import pytest
import torch
from torch import Tensor

from sagewan.checkpoint import kitchen, nvfp4


def read(packed: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return kitchen.unpack_nvfp4(*packed)[:rows, :columns]


def lost(packed: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
    """The square error of each block."""
    squares = (read(packed, weight) - weight.float()).square()
    return squares.unflatten(1, (-1, 16)).sum(2)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02


def test_normal_weights_lose_an_eighth_less() -> None:
    weight = random(256, 512)
    own, usual = (
        float(lost(quantise(weight), weight).sum().sqrt() / weight.norm())
        for quantise in (nvfp4.quantize_nvfp4, kitchen.quantize_nvfp4)
    )
    assert usual == pytest.approx(0.095, abs=0.001)
    assert own == pytest.approx(0.0827, abs=0.001)


@pytest.mark.parametrize(
    "weight",
    [
        random(64, 128),
        random(64, 128).bfloat16(),
        random(64, 128).half() * 1000,
        random(64, 128) * torch.logspace(-6, 2, 64)[:, None],
        random(64, 128) ** 5,
        random(64, 128).sign(),
        torch.zeros(16, 32),
        torch.linspace(-6, 6, 16 * 32).view(16, 32),
    ],
    ids=["normal", "bf16", "fp16", "rows", "outliers", "signs", "zeros", "line"],
)
def test_no_block_loses_more_than_usual(weight: Tensor) -> None:
    own = lost(nvfp4.quantize_nvfp4(weight), weight)
    usual = lost(kitchen.quantize_nvfp4(weight), weight)
    # But for values half way between two, which the order of divisions decides.
    assert (own <= usual * (1 + 1e-3) + 1e-12 * usual.max()).all()


def test_sides_are_padded_and_the_parts_it_is_done_in_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random(150, 72)
    whole = nvfp4.quantize_nvfp4(weight)
    usual = kitchen.quantize_nvfp4(weight)
    assert [(x.shape, x.dtype) for x in whole] == [(x.shape, x.dtype) for x in usual]
    monkeypatch.setattr(nvfp4, "_NUMBERS_CPU", 500)
    parts = nvfp4.quantize_nvfp4(weight)
    assert parts[0].equal(whole[0])
    assert parts[1].float().equal(whole[1].float())
    assert float((read(whole, weight) - weight).norm() / weight.norm()) < 0.085


def test_what_a_low_number_holds_exactly_stays() -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6])
    weight = values.repeat(16, 4) * torch.tensor([1.0, 0.5, 4, 448]).repeat_interleave(16)
    assert read(nvfp4.quantize_nvfp4(weight), weight).equal(weight)
