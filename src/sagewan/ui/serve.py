"""Starts the app: a free port, the worker beside it, and the end of both."""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sagewan.errors import RequestError
from sagewan.jobs.records import default_path
from sagewan.ui.downloads import DOWNLOADS

logger = logging.getLogger(__name__)

_TRIES = 20
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


def free_address(host: str, port: int | None, *, first: int = 7860) -> Address:
    """This port, or the first free one from 7860 on. RequestError if it is taken."""
    for candidate in [port] if port is not None else range(first, first + _TRIES):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return Address(host=host, port=candidate)
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


def serve(address: Address, app_of: Callable[[], object], ready: Callable[[], None]) -> None:
    """Answer until the process is told to end; ``ready`` is called once it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(
        app_of(),  # type: ignore[arg-type]
        host=address.host,
        port=address.port,
        log_level="warning",
        # Pages hold connections open to hear of events; they need not be waited for.
        timeout_graceful_shutdown=1,
    )
    worker = Worker(default_path().parent / "worker.log", delay=_PAGE_FIRST)
    server = Server(config)
    worker.start()
    # uvicorn ends in order and then raises the signal again, which must not skip the worker's end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    finally:
        DOWNLOADS.stop()
        worker.stop()
