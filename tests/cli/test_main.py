"""The command itself: help, version, plans, jobs; runs and their end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sagewan import __version__
from sagewan.cli.generate import _asked, stopped_by_signals
from sagewan.cli.show import duration, progress_text
from sagewan.errors import RejectedError
from sagewan.pipeline import run as pipeline_run
from sagewan.pipeline.progress import Event, Watch
from sagewan.plan.models import PUBLISHED
from tests.cli.conftest import Said, seconds_of_children

Run = Callable[..., Said]
SMALL = ("--size", "64x64", "--frames", "5", "--steps", "2", "--device", "cpu")


def started(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "sagewan", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if os.name == "nt" else _heed_signals,
    )


def _heed_signals() -> None:
    """A child inherits which signals are ignored: those of nohup, or of a job in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["plan", "--help"],
        ["plan"],
        ["plan", "--model", "wan2.2-t2v-a14b", "--vram", "12", "--json"],
    ],
    ids=" ".join,
)
def test_an_answer_takes_no_torch_and_no_time(words: list[str]) -> None:
    program = (
        "import sys\nfrom sagewan.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'av', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    with seconds_of_children() as spent:
        subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)
    assert spent() < 0.4, f"{spent():.2f} s"


def test_version(sagewan: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        sagewan("--version")
    assert capsys.readouterr().out == f"sagewan {__version__}\n"


def test_help_names_every_command(sagewan: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sagewan("--help")
    text = capsys.readouterr().out
    assert all(word in text for word in ("generate", "plan", "doctor", "jobs", "exit codes"))


@pytest.mark.parametrize("model", ["demo", *PUBLISHED])
def test_a_plan_needs_nothing_but_a_name(model: str, sagewan: Run) -> None:
    said = sagewan("plan", "--model", model, "--gpu", "rtx-4090")
    assert said.code == 0, said.err
    assert model in said.out
    assert "RTX 4090 with 24 GiB" in said.out
    assert max(map(len, said.out.splitlines())) <= 80


def test_a_plan_as_json(sagewan: Run) -> None:
    said = sagewan("plan", "a red ball", "--vram", "12", "--attention", "sageattn_3_fp4", "--json")
    data = json.loads(said.out)
    assert data["device"]["memory_total"] == 12 << 30
    assert data["attention"]["fallbacks"][0]["from"] == "sageattn_3_fp4"


def test_a_plan_explains_its_fallbacks(sagewan: Run) -> None:
    said = sagewan("plan", "--gpu", "h100", "--attention", "sageattn_3_fp4")
    text = " ".join(said.out.split())
    assert "sageattn_3_fp4 falls back to sageattn_3: needs compute capability 10.0" in text


@pytest.mark.parametrize(("frames", "said"), [("1", "1 frame at"), ("5", "5 frames at")])
def test_one_frame_is_one_frame(frames: str, said: str, sagewan: Run) -> None:
    assert said in sagewan("plan", "--frames", frames).out


@pytest.mark.parametrize("words", [["--vram", "0"], ["--gpu", "voodoo"], ["a red dragon"]])
def test_a_wrong_plan_is_one_sentence(words: list[str], sagewan: Run) -> None:
    said = sagewan("plan", *words)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1


def test_a_run_says_in_one_line_what_ran(
    sagewan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = sagewan("generate", "a red ball", "-o", "ball.mp4", *SMALL)
    assert said.code == 0, said.err
    (line,) = said.out.splitlines()
    assert line.startswith("ball.mp4: 5 frames 64x64, sdpa (torch.sdpa, ")
    assert "32 of 32 calls" in line
    seed = line.rpartition("seed ")[2]
    assert f"seed {seed}" in said.err, "a drawn seed is told at the start as well"
    assert [path.name for path in tmp_path.iterdir()] == ["ball.mp4"]
    assert "done" in sagewan("jobs").out
    job = json.loads(sagewan("jobs", "show", 1, "--json").out)
    assert job["report"]["output"]["frames"] == 5
    assert str(job["request"]["seed"]) == seed
    shown = sagewan("jobs", "show", "1").out
    assert "a red ball" in shown
    assert "is done: there is nothing to cancel" in sagewan("jobs", "cancel", "1").err

    again = sagewan("generate", "--from", "ball.mp4", "-o", "again.mp4")
    assert again.code == 0, again.err
    assert Path("again.mp4").read_bytes() == Path("ball.mp4").read_bytes()


def test_a_fallback_is_said_once(sagewan: Run, tmp_path: Path) -> None:
    said = sagewan(
        "generate", "a red ball", "-o", tmp_path / "b.mp4", *SMALL, "--attention", "sageattn"
    )
    assert said.code == 0, said.err
    lines = [line for line in said.err.splitlines() if "sageattn gives way to sdpa" in line]
    assert len(lines) == 1
    assert "instead of sageattn" in said.out


def test_a_rejected_result_exits_4(
    sagewan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> None:
        raise RejectedError("the video is black: kept as x.rejected.mp4")

    monkeypatch.setattr(pipeline_run, "_execute", reject)
    said = sagewan("generate", "a red ball", "-o", tmp_path / "b.mp4", *SMALL)
    assert said.code == 4
    assert said.err.endswith("sagewan: the video is black: kept as x.rejected.mp4\n")
    assert "failed" in sagewan("jobs", "list").out


def test_what_nobody_foresaw_keeps_its_traceback(
    sagewan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline_run, "_execute", fail)
    with pytest.raises(ZeroDivisionError):
        sagewan("generate", "a red ball", "-o", tmp_path / "b.mp4", *SMALL)


def test_a_database_that_can_not_be_used_is_a_warning(
    sagewan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAGEWAN_DATA", str(tmp_path / "file"))
    said = sagewan("generate", "a red ball", "-o", tmp_path / "b.mp4", *SMALL)
    assert said.code == 0
    assert "this run is not recorded" in said.err
    assert sagewan("jobs").code == 2


@pytest.mark.parametrize(
    "words", [["show"], ["list", "3"], ["show", "77"], ["show", "x"], ["list", "--limit", "0"]]
)
def test_wrong_questions_about_jobs(words: list[str], sagewan: Run) -> None:
    said = sagewan("jobs", *words)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_exits_130_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    process = started("generate", "a red ball", "-o", str(tmp_path / "b.mp4"), "--steps", "900")
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("sagewan: denoise"):
            break
    time.sleep(1)
    began = time.perf_counter()
    process.send_signal(number)
    try:
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    took = time.perf_counter() - began
    assert process.returncode == 130, "".join(lines) + rest
    assert rest.splitlines()[-1] == "sagewan: cancelled"
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
    # A block of the demo takes some hundredths of a second; the rest is the interpreter's end.
    assert took < 3, f"{took:.1f} s"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals(Watch()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_warnings_of_every_command_are_lines_of_ours(
    sagewan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path / "file"))
    said = sagewan("plan", "a red ball")
    assert said.code == 0
    assert said.err
    assert all(line.startswith("sagewan: ") for line in said.err.splitlines())


def test_no_jobs_is_said(sagewan: Run) -> None:
    assert sagewan("jobs").out == "no jobs yet\n"


def test_a_prompt_without_quotes_is_told_of_them(sagewan: Run) -> None:
    said = sagewan("generate", "a", "red", "ball")
    assert said.code == 2
    assert "put the prompt in quotes" in said.err
    assert "see sagewan generate --help" in sagewan("generate", "x", "--colour", "red").err


@pytest.mark.parametrize(
    ("fallbacks", "asked"),
    [
        ([], ""),
        ([("sageattn_3", "sageattn"), ("sageattn", "sdpa")], " instead of sageattn_3"),
        ([("sageattn", "sdpa"), ("flash_attn", "sdpa")], " instead of sageattn, flash_attn"),
    ],
)
def test_the_summary_names_what_gave_way(fallbacks: list[tuple[str, str]], asked: str) -> None:
    steps = [{"from": source, "to": target} for source, target in fallbacks]
    # The mode of the ends may have given way, and not the one that was asked for.
    assert _asked({"attention": {"requested": "sdpa", "fallbacks": steps}}) == asked


def test_progress_is_told_in_words() -> None:
    event = Event(stage="denoise", done=4, total=16, seconds=2.0, seconds_left=6.0)
    assert progress_text(event) == "4/16, 0.50 s/step, 6.0 s left"
    assert progress_text(Event(stage="denoise", total=16)) == "0/16"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.84, "9.8 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")],
)
def test_durations_are_told_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
