"""Models fetched from the page: the published ones, where it is allowed, one at a time."""

import sys
import time

import pytest

from sagewan.errors import RequestError
from sagewan.jobs.queue import Queue
from sagewan.ui import downloads
from sagewan.ui.boards import BOARDS
from sagewan.ui.downloads import Downloads
from sagewan.ui.found import model_facts
from sagewan.ui.words import Words

NAME = "wan2.1-t2v-1.3b"
PROGRAM = """
import sys, time
print("sagewan: 0.10 of 1.00 GB", file=sys.stderr, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    short = (sys.executable, "-c", PROGRAM, "0.3", "1")
    monkeypatch.setattr(downloads, "_COMMAND", short)


def test_a_download_says_how_far_it_is_and_that_it_failed(
    command: None, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Downloads()
    monkeypatch.setattr("sagewan.ui.boards.DOWNLOADS", known)
    queue.set_draft("me", {"model": NAME})
    board = BOARDS["model"]
    assert f"sagewan download {NAME}" in board(queue, "me", Words("en"))
    known.start(NAME)
    with pytest.raises(RequestError, match="another model"):
        known.start("wan2.2-ti2v-5b")
    download = known.get(NAME)
    assert download is not None
    while not download.line:
        time.sleep(0.02)
    assert "0.10 of 1.00 GB" in board(queue, "me", Words("zh"))
    download.process.wait(20)
    assert download.failed
    assert "0.10 of 1.00 GB" in board(queue, "me", Words("en"))
    known.stop()


def test_nothing_else_is_fetched(command: None) -> None:
    known = Downloads()
    for name in ("demo", "../x", "evil/repository", "--to=/etc"):
        with pytest.raises(RequestError, match="does not fetch"):
            known.start(name)
    known.allowed = False
    with pytest.raises(RequestError, match="does not fetch"):
        known.start(NAME)


def test_a_model_that_is_here_is_said_with_what_it_is(queue: Queue) -> None:
    facts, problems = model_facts("demo")
    assert facts[:2] == ("demo", "t2v/i2v")
    assert 10 < float(facts[-1].removesuffix(" MB")) < 40
    assert problems == ()
    assert model_facts(NAME) == ((), ())
    assert "demo · t2v/i2v" in BOARDS["model"](queue, "me", Words("en"))


def test_a_download_that_does_not_end_by_itself_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stubborn = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "print('deaf', file=sys.stderr, flush=True); time.sleep(60)"
    monkeypatch.setattr(downloads, "_COMMAND", (sys.executable, "-c", stubborn))
    monkeypatch.setattr(downloads, "_GRACE", 0.2)
    known = Downloads()
    known.start(NAME)
    download = known.get(NAME)
    assert download is not None
    while not download.line:
        time.sleep(0.02)
    known.stop()
    assert not download.running
