"""Command lines, run in this process."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from sagewan.cli import main


@dataclass(frozen=True)
class Said:
    """What a command answered: its exit code, and its lines."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def seconds_of_children() -> Iterator[Callable[[], float]]:
    """The processor time of the processes that the block runs; other work does not count."""
    before = os.times()

    def spent() -> float:
        after = os.times()
        user = after.children_user - before.children_user
        return user + after.children_system - before.children_system

    yield spent


@pytest.fixture
def sagewan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run ``sagewan`` with these words."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run
