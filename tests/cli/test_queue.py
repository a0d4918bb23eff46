"""``sagewan queue`` and ``sagewan compare`` as they are typed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sagewan.jobs.outputs import outputs_folder
from sagewan.jobs.records import default_path
from tests.cli.conftest import Said

Sagewan = Callable[..., Said]
TINY = ("--size", "64x64", "--frames", "5", "--steps", "2")


def test_a_queue_is_filled_changed_and_worked_off(sagewan: Sagewan) -> None:
    assert sagewan("queue").out == "the queue is empty\n"
    added = sagewan("queue", "add", "a red ball", *TINY, "--seed", "3").out
    assert added.startswith(f"job 1: seed 3, becomes {outputs_folder()}")
    assert "a-red-ball.mp4; sagewan queue work" in added
    sagewan("queue", "add", "a blue star", *TINY, "-o", "my star.mp4")
    moved = sagewan("queue", "move", "2", "first")
    assert [line.split()[0] for line in moved.out.splitlines()] == ["2", "1"]
    assert sagewan("queue", "cancel", "1").out == "job 1: cancelled\n"
    assert sagewan("queue", "repeat", "1", "--seed", "9").out.startswith("job 3: seed 9, becomes ")
    assert sagewan("queue", "work", "--until-empty").code == 0
    jobs = json.loads(sagewan("jobs", "--json").out)
    assert {job["id"]: job["state"] for job in jobs} == {1: "cancelled", 2: "done", 3: "done"}
    videos = sorted(path.name for path in outputs_folder().rglob("*.mp4"))
    assert videos == ["a-red-ball.mp4", "my-star.mp4"]
    assert sagewan("queue", "remove", "2").code == 0
    assert len(list(outputs_folder().rglob("*.mp4"))) == 1


def test_a_worker_that_ends_before_its_parent_does_so_in_order() -> None:
    command = [sys.executable, "-m", "sagewan", "queue", "work", "--until-empty", "--while-stdin"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as worker:  # type: ignore[call-overload]
        assert worker.wait(60) == 0
        assert worker.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("add", "a red ball", "--frames", "6"), "frames=6"),
        (("add", "a zebra"), "never taught 'zebra'"),
        (("add",), "prompt is missing"),
        (("move", "7", "first"), "job=7"),
        (("cancel", "7"), "job=7"),
        (("repeat", "7"), "job=7"),
        (("remove", "7"), "job=7"),
    ],
)
def test_what_the_queue_refuses(sagewan: Sagewan, words: tuple[str, ...], sentence: str) -> None:
    said = sagewan("queue", *words)
    assert said.code == 2
    assert sentence in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("action", ["list", "work"])
def test_a_queue_that_is_no_database_is_one_sentence(sagewan: Sagewan, action: str) -> None:
    default_path().parent.mkdir(parents=True, exist_ok=True)
    default_path().write_text("no database, by far " * 100)
    said = sagewan("queue", action)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "can't be used" in said.err


def test_a_finished_job_is_not_moved(sagewan: Sagewan) -> None:
    sagewan("queue", "add", "a red ball", *TINY)
    sagewan("queue", "cancel", "1")
    said = sagewan("queue", "move", "1", "up")
    assert (said.code, "only a queued job can be moved" in said.err) == (2, True)


def test_settings_are_compared(sagewan: Sagewan, tmp_path: Path) -> None:
    output = tmp_path / "cmp.mp4"
    settings = ("--with", "attention=sdpa", "--with", "attention=sageattn emulate=yes steps=1")
    said = sagewan("compare", "a red ball", *TINY, "-o", output, *settings)
    assert said.code == 0
    assert "| attention=sageattn emulate=True steps=1 | sageattn (emulated) |" in said.out
    assert "| attention=sdpa | sdpa |" in said.out
    assert output.exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("attention",), "write FIELD=VALUE"),
        (("setps=3",), "write FIELD=VALUE"),
        (("steps=x",), "steps=x: write a whole number"),
        (("emulate=maybe",), "write yes or no"),
        (("attention='sdpa",), "quotation"),
        (("steps=3",), "2 to 4 settings"),
        (("steps=3", "attention_ends=sdpa:1,1"), "choose one with attention"),
    ],
)
def test_what_compare_refuses(
    sagewan: Sagewan, tmp_path: Path, settings: tuple[str, ...], sentence: str
) -> None:
    words = [word for setting in settings for word in ("--with", setting)]
    said = sagewan("compare", "a red ball", "-o", tmp_path / "cmp.mp4", *words)
    assert said.code == 2
    assert sentence in said.err
    assert list(tmp_path.iterdir()) == []
