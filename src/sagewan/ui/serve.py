"""Starts the app: a port, the pages, the worker beside them, and the end of all."""

import contextlib
import errno
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sagewan.errors import RequestError
from sagewan.jobs.records import default_path
from sagewan.ui.downloads import DOWNLOADS
from sagewan.ui.front import OURS, Front, Site
from sagewan.ui.uploads import keep_swept
from sagewan.ui.words import LANGUAGES

if TYPE_CHECKING:
    from starlette.applications import Starlette

logger = logging.getLogger(__name__)

_TRIES = 20
# Visitors who may come at once before the first is served.
_WAITING = 128
# Seconds that a worker gets to put its job back; a step of a large model may take a minute.
_GRACE = 30.0
# A worker that dies at once, again and again, is not helped by more tries.
_PAUSES = (0.0, 1.0, 5.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the app answers."""

    host: str
    port: int

    @property
    def url(self) -> str:
        host = "localhost" if self.host in ("127.0.0.1", "0.0.0.0", "::") else self.host  # noqa: S104
        return f"http://{host}:{self.port}/"


def listen(host: str, port: int | None, *, first: int = 7860) -> socket.socket:
    """Take this port, or the first free one from 7860 on; whoever comes from now on waits until
    it is served. RequestError if it is taken, or the host is not this machine."""
    for candidate in [port] if port is not None else range(first, first + _TRIES):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named as TCP, so that asyncio sends small answers at once: else each waits 40 ms for the
        # receipt of its own headers.
        taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if sys.platform != "win32":
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((host, candidate))
            # Two can be bound to a port, but only one listens.
            taken.listen(_WAITING)
        except OSError as error:
            taken.close()
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise RequestError(
                    f"host={host}: this machine has no such address; give one that it has, or "
                    "0.0.0.0 for all"
                ) from error
        else:
            return taken
    wanted = f"port={port} is" if port is not None else f"ports {first} to {first + _TRIES - 1} are"
    raise RequestError(f"{wanted} taken on {host}: choose another with --port")


# The page has the processor to itself while it opens; nobody has written a prompt sooner.
_PAGE_FIRST = 3.0


class Worker:
    """``sagewan queue work`` in a process of its own, started again if it dies.

    Its standard input is a pipe of ours: when this process is gone, however it went, the worker
    sees the pipe's end and stops as well.
    """

    def __init__(self, log: Path, *, delay: float = 0.0) -> None:
        """``delay`` seconds go by before it starts for the first time."""
        self._log = log
        self._delay = delay
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it; its job goes back to the queue."""
        self._stopping.set()
        process = self._process
        if process and process.poll() is None:
            _close(process)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(_GRACE)

    def _keep(self) -> None:
        if self._stopping.wait(self._delay):
            return
        deaths = 0
        while not self._stopping.wait(_PAUSES[min(deaths, len(_PAUSES) - 1)]):
            began = time.monotonic()
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "sagewan", "queue", "work", "--while-stdin"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                )
                if self._stopping.is_set():
                    # The end was asked for while this one was being made, and could not see it.
                    _close(self._process)
                code = self._process.wait()
                _close(self._process)
            if self._stopping.is_set():
                return
            deaths = 1 if time.monotonic() - began > 60 else deaths + 1
            logger.warning("the worker ended with %s and is started again; see %s", code, self._log)


def _close(process: "subprocess.Popen[bytes]") -> None:
    """Let go of its standard input, which tells it to end."""
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()


def serve(listener: socket.socket, site: Site, ready: Callable[[], None]) -> None:
    """Answer until the process is told to end; ``ready`` is called once it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def end(self) -> None:
            self.should_exit = True

    # Where anyone may come in, nobody may fill the disk.
    DOWNLOADS.allowed = site.loopback or site.login is not None
    front = Front(site, {OURS: _ours, **{name: partial(_page, name) for name in LANGUAGES}})
    config = uvicorn.Config(
        front.app,
        log_level="warning",
        # Pages hold connections open to hear of events; they need not be waited for.
        timeout_graceful_shutdown=1,
    )
    worker = Worker(default_path().parent / "worker.log", delay=_PAGE_FIRST)
    server = Server(config)
    front.failed = server.end
    worker.start()
    stopping = threading.Event()
    threading.Thread(target=keep_swept, args=(stopping,), name="uploads", daemon=True).start()
    # uvicorn ends in order and then raises the signal again, which must not skip the worker's end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run([listener])
    finally:
        stopping.set()
        DOWNLOADS.stop()
        worker.stop()
    if front.error:
        raise front.error


def _ours() -> "Starlette":
    """gradio is imported first of all: the pages wait for it."""
    from sagewan.ui.quick_gradio import import_gradio

    import_gradio()
    from sagewan.ui.server import make_app

    return make_app()


def _page(language: str) -> "Starlette":
    from sagewan.ui.mounted import make_page

    return make_page(language)
