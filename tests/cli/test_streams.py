"""Readers that go away, and encodings that lack a character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagewan.cli import streams


def answer(*words: str, stderr: int = subprocess.PIPE, **variables: str) -> "tuple[int, str]":
    """The exit code and the errors of a command whose reader has gone before it writes."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "sagewan", *words],
        stdout=writer,
        stderr=writer if stderr == subprocess.STDOUT else stderr,
        env={**os.environ, **variables},
        check=False,
    )
    os.close(writer)
    return process.returncode, (process.stderr or b"").decode()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plan", "--json"],
        ["jobs"],
        ["jobs", "list", "--json"],
        ["doctor", "--json", "--device", "cpu"],
    ],
    ids=" ".join,
)
def test_a_reader_that_goes_away_ends_a_command_quietly(words: list[str]) -> None:
    assert answer(*words) == (streams.CLOSED, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_help_that_nobody_reads_is_quiet() -> None:
    # The exit code is argparse's affair: it drops the error itself where output is not buffered.
    assert answer("generate", "--help")[1] == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_run_goes_on_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    small = ("--size", "64x64", "--frames", "5", "--steps", "1", "--device", "cpu")
    video = tmp_path / "b.mp4"
    code, _ = answer("generate", "a red ball", "-o", str(video), *small, stderr=subprocess.STDOUT)
    assert code == streams.CLOSED, "the summary could not be told"
    assert list(tmp_path.iterdir()) == [video]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_refusal_that_nobody_reads_keeps_its_exit_code() -> None:
    assert answer("generate", "", stderr=subprocess.STDOUT)[0] == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8:strict"])
def test_every_encoding_can_hold_the_answer(encoding: str) -> None:
    words = [sys.executable, "-m", "sagewan", "plan"]
    variables = {**os.environ, "PYTHONIOENCODING": encoding}
    process = subprocess.run(words, env=variables, capture_output=True, check=False)
    assert process.returncode == 0, process.stderr
    assert b"torch.sdpa" in process.stdout
