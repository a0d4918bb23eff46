"""Comparisons: names, refusals, the walls of frames, a real one."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from sagewan.errors import RequestError
from sagewan.pipeline.chart import bars
from sagewan.pipeline.compare import compare, variants_of
from sagewan.pipeline.export import read_frames
from sagewan.pipeline.progress import Event, Watch
from sagewan.pipeline.tiles import GAIN, Wall
from sagewan.plan.request import Request
from sagewan.plan.step_cache import StepCache


def flat(*levels: int, size: tuple[int, int] = (32, 48)) -> Iterator[NDArray[np.uint8]]:
    return (np.full((*size, 3), level, np.uint8) for level in levels)


def test_variants_share_all_but_what_they_change(tmp_path: Path) -> None:
    base = Request(prompt="a red ball", output=tmp_path / "cmp.mp4", report=tmp_path / "r.json")
    first, second = variants_of(base, [{"attention": "sdpa"}, {"size": [64, 64], "steps": 3}])
    assert (first.name, second.name) == ("attention=sdpa", "size=64x64 steps=3")
    assert first.request.seed == second.request.seed is not None
    assert second.request.output == tmp_path / "cmp-2.mp4"
    assert second.request.report is None


def test_a_variant_can_turn_off_what_the_others_have() -> None:
    base = Request(prompt="a red ball", cache=StepCache.parse("easy:0.05"), block_swap=3)
    changes = [{"cache": None, "block_swap": None}, {"cache": "easy:0.1"}]
    first, second = variants_of(base, changes)
    assert (first.name, second.name) == ("cache=none block_swap=auto", "cache=easy:0.1")
    assert (first.request.cache, first.request.block_swap) == (None, None)
    assert (str(second.request.cache), second.request.block_swap) == ("easy:0.1", 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([{"steps": 3}], "2 to 4 settings"),
        ([{"steps": n} for n in range(1, 6)], "2 to 4 settings"),
        ([{"steps": 3}, {"steps": 3}], "one setting twice"),
        ([{"steps": 3}, {"seed": 3}], "keeps seed the same"),
        ([{"steps": 3}, {"setps": 3}], "setps is not known"),
        ([{"steps": 3}, {"steps": 0}], "steps=0"),
    ],
)
def test_what_cannot_be_compared(changes: list[dict[str, object]], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        variants_of(Request(prompt="a red ball"), changes)


@pytest.mark.parametrize(("count", "shape"), [(2, (52, 96)), (3, (52, 144)), (4, (104, 96))])
def test_a_wall_has_a_place_for_each(count: int, shape: tuple[int, int]) -> None:
    wall = Wall([str(number) for number in range(count)])
    (frame,) = wall.frames([flat(40 * (number + 1)) for number in range(count)])
    assert frame.shape == (*shape, 3)
    assert {40 * (number + 1) for number in range(count)} <= set(np.unique(frame))


def test_differences_are_strengthened_and_a_short_video_stays() -> None:
    frames = list(Wall(["a", "b"]).differences([flat(100, 100), flat(103)]))
    assert len(frames) == 2
    assert (frames[1][30, 10] == 100).all()
    assert (frames[1][30, 60] == 3 * GAIN).all()


def test_another_size_is_fitted() -> None:
    (frame,) = Wall(["a", "b"]).frames([flat(9), flat(70, size=(64, 64))])
    assert (frame[30, 60] == 70).all()


def test_a_chart_is_svg_with_a_bar_each() -> None:
    text = bars(["a<b", "c"], {"seconds": [2.0, 4.0], "dB": [None, 30.0]})
    tree = ElementTree.fromstring(text)
    widths = [float(rect.attrib["width"]) for rect in tree.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(widths) == 5
    assert widths[2] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[3] == 0
    assert "a&lt;b" in text


def test_marked_bars_alone_have_a_colour() -> None:
    names, values = ["ours", "theirs", "ours too"], [1.0, 2.0, 3.0]
    tree = ElementTree.fromstring(bars(names, {"s": values}, marked=["ours", "ours too"]))
    _, *fills = (r.attrib["fill"] for r in tree.iter("{http://www.w3.org/2000/svg}rect"))
    assert fills[0] == fills[2] != fills[1]


def test_a_real_comparison(tmp_path: Path) -> None:
    base = Request(
        prompt="a red ball rolls to the right",
        seed=1,
        size=(64, 64),
        frames=5,
        steps=2,
        output=tmp_path / "cmp.mp4",
    )
    changes = [
        {"attention": "sdpa"},
        {"attention": "sageattn_3_fp4", "emulate": True},
        {"cfg": 1.0},
    ]
    events: list[Event] = []
    comparison = compare(variants_of(base, changes), watch=Watch(events.append))
    first, second, third = comparison.videos
    assert first.likeness is None
    assert second.likeness is not None
    assert third.likeness is not None
    assert 10 < second.likeness.psnr < 80
    assert third.likeness.psnr != second.likeness.psnr
    assert second.result.report["attention"]["ran"][0]["mode"] == "sageattn_3_fp4"
    assert {event.part for event in events} >= {"1/3 attention=sdpa", "3/3 cfg=1.0", None}
    kept = json.loads((tmp_path / "cmp.json").read_text())
    assert kept == json.loads(json.dumps(comparison.to_json()))
    assert (tmp_path / "cmp.md").read_text() == comparison.table()
    assert "sageattn_3_fp4" in comparison.table()
    assert len(list(read_frames(tmp_path / "cmp.mp4"))) == 5
    assert next(read_frames(tmp_path / "cmp-difference.mp4")).shape == (84, 192, 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cmp-1.mp4", "cmp-2.mp4", "cmp-3.mp4", "cmp.mp4", "cmp-difference.mp4"),
        *("cmp.md", "cmp.json", "cmp.svg"),
    }
