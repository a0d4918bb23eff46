"""Ports, passwords, and a worker that is started again."""

import ast
import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sagewan
from sagewan.cli import main
from sagewan.errors import RequestError
from sagewan.ui import serve
from sagewan.ui.serve import Address, Worker, listen

UI = Path(sagewan.__file__).parent / "ui"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield int(held.getsockname()[1])


def test_a_busy_port_is_passed_over_unless_it_was_asked_for(taken: int) -> None:
    with listen("127.0.0.1", None, first=taken) as listener:
        assert listener.getsockname()[1] > taken
    with pytest.raises(RequestError, match=f"port={taken} is taken"):
        listen("127.0.0.1", taken)


def test_of_two_that_start_at_once_each_gets_a_port_of_its_own(taken: int) -> None:
    with listen("127.0.0.1", None, first=taken) as first:
        port = first.getsockname()[1]
        with pytest.raises(RequestError, match=f"port={port} is taken"):
            listen("127.0.0.1", port)
        with listen("127.0.0.1", None, first=taken) as second:
            assert second.getsockname()[1] > port


def test_small_answers_are_sent_at_once() -> None:
    async def undelayed() -> int:
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        with listen("127.0.0.1", None) as listener:
            server = await asyncio.start_server(lambda _, w: accepted.put_nowait(w), sock=listener)
            _, visitor = await asyncio.open_connection(*listener.getsockname())
            answering = await accepted.get()
            told = answering.get_extra_info("socket").getsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY
            )
            for one in (visitor, answering):
                one.close()
                await one.wait_closed()
            server.close()
            return int(told)

    assert asyncio.run(undelayed())


def test_the_address_is_one_that_a_browser_opens() -> None:
    assert Address(host="127.0.0.1", port=7860).url == "http://localhost:7860/"
    assert Address(host="0.0.0.0", port=1).url == "http://localhost:1/"
    assert Address(host="10.0.0.7", port=1).url == "http://10.0.0.7:1/"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--share"], "give --auth as well"),
        (["--auth", "me"], "write NAME:PASSWORD"),
        (["--auth", ":x"], "write NAME:PASSWORD"),
        (["--host", "999.1.1.1", "--port", "1"], "no such address"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ui", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("host", ["203.0.113.1", "not a name"])
@pytest.mark.parametrize("port", [None, 7860])
def test_an_address_of_another_machine_is_not_taken_for_a_taken_port(
    host: str, port: int | None
) -> None:
    with pytest.raises(RequestError, match=f"host={host}: this machine has no such address"):
        listen(host, port)


def test_it_listens_to_this_machine_only_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(
        serve, "serve", lambda listener, *_: served.append(listener.getsockname()[0])
    )
    assert main(["ui", "--no-browser"]) == 0
    assert served == ["127.0.0.1"]


def test_a_worker_that_dies_is_started_again_and_ends_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    enough = threading.Event()
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        assert command[1:] == ["-m", "sagewan", "queue", "work", "--while-stdin"]
        # The first dies at once, the second reads until its input ends.
        program = "import sys; sys.stdin.read()" if started else "import os; os._exit(9)"
        process = real([sys.executable, "-c", program], **options)  # type: ignore[call-overload]
        started.append(process.pid)
        if len(started) == 2:
            enough.set()
        return process

    monkeypatch.setattr(serve.subprocess, "Popen", popen)
    monkeypatch.setattr(serve, "_PAUSES", (0.0, 0.05))
    worker = Worker(tmp_path / "worker.log")
    worker.start()
    assert enough.wait(30)
    worker.stop()
    assert len(started) == 2


def test_a_worker_that_was_just_being_started_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, asked = threading.Event(), threading.Event()
    real = subprocess.Popen

    def popen(_: list[str], **options: object) -> object:
        making.set()
        assert asked.wait(30)
        program = "import sys; sys.stdin.read()"
        return real([sys.executable, "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(serve.subprocess, "Popen", popen)
    monkeypatch.setattr(serve, "_GRACE", 20.0)
    worker = Worker(tmp_path / "worker.log")
    worker.start()
    assert making.wait(30)
    threading.Timer(0.2, asked.set).start()
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10


def test_a_worker_lets_the_page_open_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*_: object, **__: object) -> object:
        raise AssertionError("started before its delay was over")

    monkeypatch.setattr(serve.subprocess, "Popen", popen)
    worker = Worker(tmp_path / "worker.log", delay=60.0)
    worker.start()
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10
    assert not worker._thread.is_alive()


def test_no_handler_is_long_and_no_file_either() -> None:
    for path in UI.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "words" not in path.parts:
            assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 40, (path, node.name)
