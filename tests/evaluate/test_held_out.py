"""The demo's prompts, what they promise, and clips that keep it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sagewan.checkpoint.find import find_model
from sagewan.errors import CheckpointError, RequestError
from sagewan.evaluate import world
from sagewan.evaluate.held_out import Asked, held_out_prompts, judge
from sagewan.plan.words import check_words

MODEL = find_model("demo")


def test_prompts_are_a_sequence_of_a_seed() -> None:
    few, many = held_out_prompts(5, 1, MODEL), held_out_prompts(60, 1, MODEL)
    assert many[:5] == few
    assert held_out_prompts(5, 2, MODEL) != few
    assert len({one.prompt for one in many}) > 50


def test_every_prompt_is_held_out_and_known() -> None:
    asked = held_out_prompts(200, 0, MODEL)
    assert {one.language for one in asked} == {"en", "zh"}
    for one in asked:
        check_words("prompt", one.prompt, MODEL)
        promised = one.promised()
        combination = (promised[name] for name in ("shape", "colour", "motion"))
        assert world.held_out(*combination).all()
    assert {len(one.objects) for one in asked} == {1, 2}
    named = sum(one.background is not None for one in asked)
    assert 80 <= named <= 120


@pytest.mark.parametrize(("objects", "motions"), [(1, ["up", "orbit"]), (2, ["grow", "bounce"])])
def test_only_what_a_model_was_taught_is_asked_for(
    tmp_path: Path, objects: int, motions: list[str]
) -> None:
    text = json.dumps({"taught": {"objects": objects, "motions": motions}})
    (tmp_path / "sagewan.json").write_text(text)
    asked = held_out_prompts(60, 0, replace(MODEL, location=tmp_path, words={}))
    assert {len(one.objects) for one in asked} == set(range(1, objects + 1))
    assert {thing["motion"] for one in asked for thing in one.objects} == set(motions)


def test_all_of_the_world_is_asked_for_where_nothing_is_said(tmp_path: Path) -> None:
    asked = held_out_prompts(200, 0, replace(MODEL, location=tmp_path, words={}))
    assert {thing["motion"] for one in asked for thing in one.objects} == set(world.MOTIONS)


def test_what_a_model_cannot_have_been_taught_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="never taught"):
        held_out_prompts(3, 0, replace(MODEL, words={"shape": ("ball",)}))
    (tmp_path / "sagewan.json").write_text(json.dumps({"taught": {"motions": ["fly"]}}))
    with pytest.raises(CheckpointError, match="motions of right, left"):
        held_out_prompts(3, 0, replace(MODEL, location=tmp_path))


def test_a_drawn_clip_keeps_its_prompt_and_no_other() -> None:
    # A red disc that goes to the right on navy.
    axis = (torch.arange(256) + 0.5) / 128 - 1
    red, navy = (torch.tensor(table) for table in (
        world.COLOURS["red"], world.BACKGROUNDS["navy"],
    ))  # fmt: skip
    frames = torch.empty(17, 256, 256, 3)
    for number, x in enumerate(torch.linspace(-0.4, 0.4, 17)):
        disc = ((axis[None, :] - x).square() + axis[:, None].square()).sqrt() < 0.42
        frames[number] = torch.where(disc[..., None], red * 0.96, navy * 0.95)
    ball = {"shape": "ball", "colour": "red", "motion": "right", "size": "large"}
    right = Asked(prompt="x", objects=(ball,), background="navy")
    wrong = {
        "shape": Asked(prompt="x", objects=(ball | {"shape": "star"},)),
        "motion": Asked(prompt="x", objects=(ball | {"motion": "left"},)),
        "size": Asked(prompt="x", objects=(ball | {"size": "small"},)),
        "background": replace(right, background="grey"),
        "count": Asked(prompt="x", objects=(ball, ball | {"colour": "blue"})),
    }
    video = (frames * 255).round().to(torch.uint8)
    asked = [right, *wrong.values()]
    found = judge(video.expand(len(asked), -1, -1, -1, -1), asked)
    assert all(found[0].values())
    assert set(found[0]) == {"count", "shape", "colour", "motion", "size", "background", "all"}
    for name, right_of in zip(wrong, found[1:], strict=True):
        assert not right_of[name]
        assert not right_of["all"]
