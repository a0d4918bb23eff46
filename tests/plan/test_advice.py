"""What is advised where a plan does not fit: it fits, and fewer changes would not do."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Hardware
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.parse import parsed
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import CARDS, pretend
from sagewan.plan.request import Request
from sagewan.plan.weights import QUANTIZED_AS
from tests.machines import machine

T2V = PUBLISHED["wan2.1-t2v-14b"]
Change = tuple[str, str]


def made(request: Request, model: Model, hardware: Hardware) -> Plan:
    return make_plan(request, model, hardware, Evidence())


def advised(plan: Plan) -> str:
    """What is said after the reason, empty where it fits."""
    note = next((note for note in plan.notes if note.startswith("this will not fit")), "")
    return note.partition("; ")[2]


def ways_of(said: str) -> Iterator[list[Change]]:
    """Each way that a piece of advice names, as (flag, value)."""
    before: list[Change] = []
    for way in said.removesuffix(" would fit").split(" or "):
        found = re.findall(r"--(\w+) ([\w.]+)", way)
        if found[0][0] == "size" and len(found) == 1 and before and before[-1][0] == "frames":
            found = [*before[:-1], *found]
        before = found
        yield found


def with_changes(changes: list[Change], request: Request, model: Model) -> tuple[Request, Model]:
    for flag, value in changes:
        if flag == "to":
            model = replace(model, quantized=QUANTIZED_AS[value])
            flag = "quantization"
        request = replace(request, **{flag: parsed(flag, value)})
    return request, model


def check(request: Request, model: Model, hardware: Hardware) -> list[list[Change]]:
    """The ways that are advised, each of which fits."""
    said = advised(made(request, model, hardware))
    if not said.endswith(" would fit"):
        return []
    ways = list(ways_of(said))
    assert ways, said
    for changes in ways:
        plan = made(*with_changes(changes, request, model), hardware)
        assert plan.memory.fits, (changes, said, plan.notes)
    counts = {len(changes) for changes in ways}
    assert len(counts) == 1, said
    return ways


def test_a_shorter_and_a_smaller_video_are_said_and_fit() -> None:
    request = Request(prompt="x", size=(1920, 1088), frames=121)
    ways = check(request, T2V, pretend(machine(), gpu=None, vram=8, ram=32))
    assert [[flag for flag, _ in way] for way in ways] == [["frames"], ["size"]]
    # One step more would not fit.
    ((_, frames),) = ways[0]
    longer = replace(request, frames=int(frames) + 4)
    assert not made(longer, T2V, pretend(machine(), gpu=None, vram=8, ram=32)).memory.fits


def test_too_little_host_memory_is_said() -> None:
    request = Request(prompt="x", quantization="fp8_scaled")
    hardware = pretend(machine(), gpu=None, vram=12, ram=16)
    assert "GiB of host memory" in made(request, T2V, hardware).notes[-1]
    assert check(request, T2V, hardware) == [[("to", "fp8_scaled")]]


def test_where_no_change_is_enough_the_fewest_are_said() -> None:
    # 8 bits are whole on this host while they are made, and the video is too long for the card.
    request = Request(prompt="x", quantization="fp8_scaled", size=(832, 480), frames=241)
    hardware = pretend(machine(), gpu=None, vram=5, ram=8)
    ways = check(request, T2V, hardware)
    assert [[flag for flag, _ in way] for way in ways] == [["to", "frames"], ["to", "size"]]
    for changes in ways:
        for one in changes:
            alone = made(*with_changes([one], request, T2V), hardware)
            assert not alone.memory.fits, one
    # On a CPU the text encoder's dtype, the transformer's bits and the size each have their part.
    request = Request(prompt="x", quantization="none", size=(1280, 704), frames=5, device="cpu")
    hardware = pretend(machine(), gpu=None, vram=None, ram=16)
    (way,) = check(request, T2V, hardware)
    assert [flag for flag, _ in way] == ["dtype", "quantization", "size"]


@pytest.mark.parametrize("gpu", [name for name, (_, vram) in CARDS.items() if vram <= 24])
def test_what_is_advised_fits_on_every_card(gpu: str) -> None:
    hardware = pretend(machine(), gpu=gpu, vram=None, ram=8)
    request = Request(prompt="x", size=(2560, 1472), frames=121, quantization="fp8_scaled")
    assert check(request, T2V, hardware)


@pytest.mark.parametrize("quantization", ["none", "fp8_scaled"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("text", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_what_is_advised_of_the_host_fits(
    stored: str, text: str, dtype: str, quantization: str
) -> None:
    model = replace(T2V, dtypes={"transformer": stored, "text_encoder": text})
    request = Request(prompt="x", quantization=quantization, dtype=dtype)
    for ram in (12, 16, 24):
        hardware = pretend(machine(), gpu=None, vram=24, ram=ram)
        memory = made(request, model, hardware).memory
        # A text encoder that is made anew is whole on the host, whatever the transformer is.
        lost = memory.stages[0].host > memory.host_room and text != dtype == "bfloat16"
        assert check(request, model, hardware) or memory.fits or lost


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_advised_of_a_cpus_memory_fits(name: str, dtype: str) -> None:
    said = 0
    for ram in (8, 16, 32):
        hardware = pretend(machine(), gpu=None, vram=None, ram=ram)
        settings: dict[str, Any] = {"dtype": dtype, "quantization": "none", "device": "cpu"}
        request = Request(prompt="x", **settings)
        said += bool(check(request, PUBLISHED[name], hardware))
        found = advised(made(request, PUBLISHED[name], hardware))
        assert not found or "--" in found or found == "choose a smaller model"
    # TI2V's text alone takes more than any that it does not fit in has.
    assert said or name == "wan2.2-ti2v-5b" or dtype == "bfloat16"


def test_a_models_own_bits_are_kept() -> None:
    """What a file holds quantised can't be made of fewer bits: that is not advised."""
    model = replace(T2V, quantized=QUANTIZED_AS["fp8_scaled"])
    request = Request(prompt="x", size=(1920, 1088), frames=121)
    ways = check(request, model, pretend(machine(), gpu=None, vram=6, ram=16))
    assert ways
    assert {flag for way in ways for flag, _ in way} <= {"frames", "size"}


def test_another_dtype_is_advised_with_the_attention_that_it_brings() -> None:
    """Float32 has no quantised attention; what takes its place takes more."""
    hardware = pretend(machine("4090", triton="3.6.0"), gpu="rtx-4090", vram=10, ram=12)
    request = Request(prompt="x", preset="low-vram", dtype="float32", size=(1920, 1080), frames=121)
    for attention in (None, "sdpa"):
        asked = replace(request, attention=attention)
        ways = check(asked, PUBLISHED["wan2.2-t2v-a14b"], hardware)
        assert [[flag for flag, _ in way] for way in ways] == [
            ["dtype", "frames"],
            ["dtype", "size"],
        ]
