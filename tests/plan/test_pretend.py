"""A card that is not here."""

import pytest

from sagewan.errors import RequestError
from sagewan.plan.pretend import CARDS, GIB, pretend
from tests.machines import machine


def test_nothing_pretended_is_this_machine() -> None:
    here = machine("H100")
    assert pretend(here, gpu=None, vram=None) is here


def test_memory_alone_keeps_the_kind_of_card() -> None:
    there = pretend(machine("H100"), gpu=None, vram=12)
    device = there.device("auto")
    assert (device.sm, device.memory_total) == (90, 12 * GIB)


def test_a_machine_without_a_gpu_can_plan_for_one() -> None:
    device = pretend(machine(), gpu=None, vram=8).device("auto")
    assert device.is_cuda
    assert device.memory_free == 8 * GIB


@pytest.mark.parametrize("gpu", CARDS)
def test_a_card_by_name_has_its_capability_and_memory(gpu: str) -> None:
    sm, gib = CARDS[gpu]
    device = pretend(machine(), gpu=gpu, vram=None).device("cuda")
    assert (device.sm, device.memory_total) == (sm, gib * GIB)


@pytest.mark.parametrize("gpu", ["RTX 4060 Ti", "RTX4060Ti", "NVIDIA GeForce RTX 4060 Ti"])
def test_a_card_is_known_however_it_is_spelt(gpu: str) -> None:
    device = pretend(machine(), gpu=gpu, vram=None).device("cuda")
    assert device.name == "RTX 4060 Ti with 16 GiB"


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"gpu=rtx-4091: did you mean rtx-4090\?"):
        pretend(machine(), gpu="rtx-4091", vram=None)


@pytest.mark.parametrize("vram", [0, -1, 0.5, float("nan"), 1e9])
def test_an_absurd_amount_is_refused(vram: float) -> None:
    with pytest.raises(RequestError, match="vram="):
        pretend(machine(), gpu=None, vram=vram)
