"""Flags and fields are the same set, and mean the same."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sagewan.cli import Parser
from sagewan.cli.flags import FLAGS, add_request_flags, flag_of, request_from
from sagewan.errors import RequestError
from sagewan.pipeline import export
from sagewan.plan.lora import Lora
from sagewan.plan.parse import PARSE
from sagewan.plan.request import Ends, Request
from sagewan.plan.serialize import field_types
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache

FIELDS = tuple(field.name for field in fields(Request))


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="sagewan generate", allow_abbrev=False)
    add_request_flags(result)
    return result


def parsed(*words: str) -> Request:
    return request_from(parser().parse_args(list(words)))


def test_there_is_one_flag_for_each_field() -> None:
    flags = {action.dest for action in parser()._actions} - {"help", "from_video"}
    assert flags == set(FIELDS)
    assert tuple(FLAGS) == FIELDS


def test_every_flag_has_its_fields_name_and_a_help() -> None:
    for action in parser()._actions:
        if action.dest in FLAGS and action.dest != "prompt":
            assert flag_of(action.dest) in action.option_strings
            assert action.help


def test_every_type_of_a_field_can_be_parsed() -> None:
    assert set(field_types().values()) - {bool} <= set(PARSE)


EXAMPLES: dict[str, tuple[str, Any]] = {
    "negative": ("blur", "blur"),
    "model": ("wan2.1-t2v-14b", "wan2.1-t2v-14b"),
    "image": ("a.png", Path("a.png")),
    "last_image": ("b.png", Path("b.png")),
    "output": ("c.mp4", Path("c.mp4")),
    "preset": ("balanced", "balanced"),
    "attention": ("sageattn_3", "sageattn_3"),
    "attention_ends": ("sdpa:2,1", Ends(mode="sdpa", first=2, last=1)),
    "attention_keep_layers": ("39,0", (0, 39)),
    "sparsity": ("radial:0.75,4", Sparsity(kind="radial", share=0.75, dense=4)),
    "quantization": ("fp8_scaled", "fp8_scaled"),
    "block_swap": ("20", 20),
    "cache": ("easy:0.05", StepCache(method="easy", threshold=0.05)),
    "lora": (
        "high=a.safetensors:0.5",
        (Lora(path=Path("a.safetensors"), strength=0.5, expert="high"),),
    ),
    "steps": ("12", 12),
    "cfg": ("4.5", 4.5),
    "cfg_2": ("3", 3.0),
    "boundary": ("0.9", 0.9),
    "shift": ("8", 8.0),
    "scheduler": ("lcm", "lcm"),
    "seed": ("7", 7),
    "size": ("1280x720", (1280, 720)),
    "frames": ("81", 81),
    "fps": ("24", 24),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("float16", "float16"),
    "report": ("r.json", Path("r.json")),
}


def test_every_flag_reaches_its_field() -> None:
    words = [word for field, (text, _) in EXAMPLES.items() for word in (flag_of(field), text)]
    request = parsed("a ball", *words, "--strict", "--emulate", "--no-metadata")
    for field, (_, value) in EXAMPLES.items():
        assert getattr(request, field) == value, field
    assert request.prompt == "a ball"
    assert (request.strict, request.emulate, request.metadata) == (True, True, False)
    assert set(EXAMPLES) | {"prompt", "strict", "emulate", "metadata"} == set(FIELDS)


def test_a_flag_left_out_is_the_fields_default() -> None:
    assert parsed("a ball") == Request(prompt="a ball")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "many"], "steps=many: write a whole number"),
        (["--steps", "2.5"], "steps=2.5: write a whole number"),
        (["--steps", "²"], "steps=²: write a whole number"),
        (["--cfg", "high"], "cfg=high: write a number"),
        (["--size", "big"], "write WIDTHxHEIGHT"),
        (["--attention-ends", "sdpa"], "write MODE:FIRST,LAST"),
        (["--seed", "-1"], "seed=-1"),
        (["--sparsity", "radial"], "sparsity=radial: write KIND:SHARE"),
        (["--sparsity", "radial:1"], "between 0 and 1"),
        (["--sparsity", "radial:0.5,x"], "keep the first 4 steps dense"),
        (["--sparsity", "random:0.5"], "kinds: radial, sta"),
        (["--cache", "easy"], "cache=easy: write METHOD:THRESHOLD"),
        (["--cache", "hard:0.1"], "methods: easy, mag"),
        (["--cache", "easy:nan"], "cache=easy:nan"),
        (["--cfg", "nan"], "cfg=nan"),
        (["--steps"], "expected one argument"),
        (["--wrong"], "--wrong"),
        (["--step", "3"], "--step"),
        (["--strict=yes"], "ignored explicit argument"),
    ],
)
def test_a_wrong_value_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed("a ball", *words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_video_are_overridden_by_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"prompt": "a ball", "seed": 3, "steps": 4, "strict": True, "size": [64, 64]}
    monkeypatch.setattr(export, "read_settings", lambda path: kept)
    assert parsed("--from", "v.mp4") == Request(
        prompt="a ball", seed=3, steps=4, strict=True, size=(64, 64)
    )
    assert parsed("--from", "v.mp4", "--cache", "none").cache is None
    other = parsed("--from", "v.mp4", "a box", "--seed", "4", "--no-strict")
    assert (other.prompt, other.seed, other.steps, other.strict) == ("a box", 4, 4, False)


def test_steps_that_a_video_reused_are_those_of_its_model_and_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"prompt": "a ball", "model": "wan2.1-t2v-14b", "cache": "mag:0.1@3,4/9", "shift": 5.0}
    monkeypatch.setattr(export, "read_settings", lambda path: kept)
    recorded, measured = StepCache.parse("mag:0.1@3,4/9"), StepCache.parse("mag:0.1")
    for words in ([], ["--seed", "4"], ["--steps", "8"], ["--shift", "5"]):
        assert parsed("--from", "v.mp4", *words).cache == recorded
    assert not capsys.readouterr().err
    for words in (["--shift", "3"], ["--model", "demo"], ["--lora", "a.safetensors"]):
        assert parsed("--from", "v.mp4", *words).cache == measured
        assert "names steps of another" in capsys.readouterr().err
    assert parsed("--from", "v.mp4", "--shift", "3", "--cache", str(recorded)).cache == recorded


def test_a_video_does_not_choose_the_files_that_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = {"prompt": "a ball", "output": "/etc/passwd", "report": "/home/me/.bashrc"}
    monkeypatch.setattr(export, "read_settings", lambda path: planted)
    assert parsed("--from", "v.mp4") == Request(prompt="a ball")
