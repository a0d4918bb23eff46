"""Requests survive JSON; what is not a request is refused by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagewan.errors import RequestError
from sagewan.plan.evidence import Evidence
from sagewan.plan.lora import Lora
from sagewan.plan.modes import AUTO, MODES, PRESETS
from sagewan.plan.plan import make_plan
from sagewan.plan.request import QUANTIZATIONS, SCHEDULERS, Ends, Request
from sagewan.plan.serialize import (
    field_types,
    fields_from_json,
    plan_to_json,
    request_from_json,
    request_to_json,
    settings,
)
from sagewan.plan.sparsity import KINDS, Sparsity
from sagewan.plan.step_cache import METHODS, StepCache
from tests.machines import DEMO, WAN_14B, machine

FIELDS = tuple(field.name for field in fields(Request))

text = st.text(min_size=1).filter(str.strip)
paths = st.text(st.characters(categories=["L", "N"]), min_size=1).map(Path)
ends = st.builds(
    Ends, mode=st.sampled_from(list(MODES)), first=st.integers(0, 9), last=st.integers(0, 9)
)
loras = st.builds(
    Lora,
    path=paths,
    strength=st.integers(-1000, 1000).map(lambda n: n / 100),
    expert=st.sampled_from([None, "high", "low"]),
)
sparsities = st.builds(
    Sparsity,
    kind=st.sampled_from(KINDS),
    share=st.integers(1, 999).map(lambda n: n / 1000),
    dense=st.none() | st.integers(0, 99),
)
caches = st.builds(
    StepCache,
    method=st.sampled_from(METHODS),
    threshold=st.integers(1, 1000).map(lambda n: n / 1000),
)
sides = st.integers(16, 4096)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request, in which only fields that go together are set together."""
    attention = draw(st.none() | st.sampled_from([*MODES, AUTO]))
    attention_ends = draw(st.none() | ends) if attention else None
    steps_named = bool(attention_ends and attention_ends.first + attention_ends.last)
    some_layers = st.lists(st.integers(0, 39), min_size=not steps_named, max_size=4)
    layers = draw(some_layers) if attention_ends else []
    image = draw(st.none() | paths)
    last_image = draw(st.none() | paths) if image else None
    return Request(
        prompt=draw(text),
        negative=draw(st.none() | st.text()),
        model=draw(text),
        image=image,
        last_image=last_image,
        output=Path("a.mp4"),
        preset=draw(st.none() | st.sampled_from(list(PRESETS))),
        attention=attention,
        attention_ends=attention_ends,
        attention_keep_layers=tuple(layers),
        quantization=draw(st.sampled_from([None, *QUANTIZATIONS])),
        sparsity=draw(st.none() | sparsities),
        cache=draw(st.none() | caches),
        lora=tuple(draw(st.lists(loras, max_size=2))),
        steps=draw(st.none() | st.integers(1, 1000)),
        cfg=draw(st.none() | st.floats(0, 100)),
        cfg_2=draw(st.none() | st.floats(0, 100)),
        boundary=draw(st.none() | st.floats(0, 1)),
        shift=draw(st.none() | st.floats(0.01, 100)),
        scheduler=draw(st.none() | st.sampled_from(SCHEDULERS)),
        seed=draw(st.none() | st.integers(0, 2**63 - 1)),
        size=draw(st.none() | st.tuples(sides, sides)),
        frames=draw(st.none() | st.integers(1 if last_image else 0, 250).map(lambda n: 4 * n + 1)),
        fps=draw(st.none() | st.integers(1, 240)),
        device=draw(st.sampled_from(["auto", "cpu", "cuda:1"])),
        dtype=draw(st.sampled_from(["auto", "float32"])),
        strict=draw(st.booleans()),
        emulate=draw(st.booleans()),
        metadata=draw(st.booleans()),
        report=draw(st.none() | st.just(Path("r.json"))),
    )


@given(requests())
def test_a_request_survives_json(request: Request) -> None:
    data = json.loads(json.dumps(request_to_json(request)))
    assert set(data) == set(FIELDS)
    assert request_from_json(data) == request


@given(requests())
def test_settings_are_the_request_without_where_it_wrote(request: Request) -> None:
    kept = json.loads(json.dumps(settings(request)))
    assert set(kept) == set(FIELDS) - {"output", "report"}
    again = request_from_json(kept)
    assert again.prompt == request.prompt
    assert again.seed == request.seed
    assert again.image is None or again.image.is_absolute()


def test_a_model_by_name_stays_a_name_and_a_folder_becomes_absolute() -> None:
    assert settings(Request(prompt="x", model="demo"))["model"] == "demo"
    folder = settings(Request(prompt="x", model="here"))["model"]
    assert Path(folder) == Path.cwd() / "here"
    assert settings(Request(prompt="x", model="~/here"))["model"] == str(Path.home() / "here")


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="colour_grading"):
        request_from_json({"prompt": "x", "colour_grading": True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 1),
        ("steps", "4"),
        ("steps", True),
        ("steps", 4.5),
        ("cfg", "high"),
        ("cfg", True),
        ("strict", 1),
        ("image", 1),
        ("size", [1]),
        ("size", [1, "2"]),
        ("size", "1x2"),
        ("attention_keep_layers", [0.5]),
        ("attention_ends", 3),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        fields_from_json({field: value})


def test_every_field_has_a_type_that_json_can_hold() -> None:
    request = Request(prompt="x")
    assert set(field_types()) == set(FIELDS)
    assert fields_from_json(request_to_json(request)).keys() <= set(FIELDS)


def test_a_plan_is_json_and_says_what_was_decided() -> None:
    request = Request(prompt="a cat", attention="sageattn_3_fp4", size=(1920, 1080), seed=7)
    plan = make_plan(request, WAN_14B, machine("H100"), Evidence())
    data = json.loads(json.dumps(plan_to_json(plan)))
    assert data["size"] == [1920, 1080]
    assert data["grid_size"] == [1920, 1088]
    assert data["seed"] == 7
    assert data["attention"]["requested"] == "sageattn_3_fp4"
    assert data["attention"]["main"]["mode"] == "sdpa"
    first = data["attention"]["fallbacks"][0]
    assert first["from"] == "sageattn_3_fp4"
    assert "9.0" in first["why"]
    assert data["device"]["compute_capability"] == "9.0"


def test_a_plan_with_ends_says_both_choices() -> None:
    request = Request(
        prompt="a red ball",
        attention="sageattn_3_fp4",
        attention_ends=Ends(mode="sageattn_3", first=2, last=1),
        attention_keep_layers=(0, 7),
        emulate=True,
    )
    data = plan_to_json(make_plan(request, DEMO, machine(), Evidence()))["attention"]
    assert (data["main"]["mode"], data["ends"]["mode"]) == ("sageattn_3_fp4", "sageattn_3")
    assert (data["first"], data["last"], data["keep_layers"]) == (2, 1, [0, 7])
    assert data["main"]["emulated"]
