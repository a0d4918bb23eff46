"""Requests that no model could serve are refused, with the fix in the sentence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagewan.errors import RequestError
from sagewan.plan.request import Ends, Request, parse_layers, parse_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"frames": 80}, "4n\\+1 frames; try 81"),
        ({"frames": 2}, "try 1$"),
        ({"frames": 3}, "try 5$"),
        ({"frames": 7}, "try 9$"),
        ({"frames": 1000}, "try 1001$"),
        ({"frames": 0}, "from 1 to"),
        ({"size": (8, 256)}, "from 16 to"),
        ({"size": (99999, 256)}, "from 16 to"),
        ({"attention": "sage"}, "choose from sdpa, flash_attn"),
        ({"attention": "sageatn"}, "did you mean sageattn"),
        ({"preset": "fast"}, "choose from low-vram"),
        ({"scheduler": "uni"}, "unipc"),
        ({"steps": 0}, "from 1 to"),
        ({"cfg": math.nan}, "cfg=nan"),
        ({"shift": -1.0}, "shift=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"dtype": "int3"}, "bfloat16"),
        ({"last_image": "b.png"}, "needs image"),
        ({"image": "a.png", "last_image": "b.png", "frames": 1}, "at least 5 frames"),
        ({"attention_ends": Ends(mode="sdpa", first=1, last=1)}, "choose one with attention"),
        ({"attention": "sdpa", "attention_keep_layers": (1,)}, "needs attention_ends"),
        ({"attention": "sdpa", "attention_ends": Ends(mode="sdpa", first=0, last=0)}, "no step"),
        ({"attention": "sdpa", "attention_ends": Ends(mode="no", first=1, last=1)}, "mode|choose"),
        ({"prompt": "caf\udcff"}, "prompt is not valid Unicode"),
        ({"negative": "\udcff"}, "negative is not valid Unicode"),
    ],
)
def test_each_wrong_request_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request(**{"prompt": "x", **fields})


@given(st.integers(1, 1000))
def test_the_frames_suggested_are_accepted(frames: int) -> None:
    if frames % 4 == 1:
        assert Request(prompt="x", frames=frames).frames == frames
        return
    with pytest.raises(RequestError) as refusal:
        Request(prompt="x", frames=frames)
    suggested = int(str(refusal.value).rsplit(" ", 1)[1])
    assert abs(Request(prompt="x", frames=suggested).frames - frames) <= 2


@given(st.integers(1, 9999), st.integers(1, 9999), st.sampled_from("xX×"))
def test_sizes_are_read_as_written(width: int, height: int, sign: str) -> None:
    assert parse_size(f"{width}{sign}{height}") == (width, height)


@pytest.mark.parametrize("text", ["", "1280", "1280x", "x720", "1280x720x3", "-1x5", "1.5x2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_ends_and_layers_are_read_as_written() -> None:
    assert Ends.parse("sageattn_3:2,1") == Ends(mode="sageattn_3", first=2, last=1)
    assert str(Ends.parse("sageattn_3:2,1")) == "sageattn_3:2,1"
    assert parse_layers("39,0,0") == (0, 39)
    for wrong in ("sdpa", "sdpa:2", "sdpa:a,b", "sdpa:-1,2"):
        with pytest.raises(RequestError, match="MODE:FIRST,LAST"):
            Ends.parse(wrong)
    with pytest.raises(RequestError, match="layer numbers"):
        parse_layers("0,x")
