"""``sagewan download``, started from the page: a process for each model, one at a time."""

import subprocess
import sys
import threading
from dataclasses import dataclass, field

from sagewan.errors import RequestError
from sagewan.plan.models import PUBLISHED

_COMMAND = (sys.executable, "-m", "sagewan", "download")
# Seconds that one gets to end in order when the server does.
_GRACE = 10.0


@dataclass
class Download:
    """A model that is fetched, or was: ``line`` is the last thing the command said."""

    name: str
    process: "subprocess.Popen[str]"
    line: str = ""
    _reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.line = line.strip().removeprefix("sagewan: ") or self.line


class Downloads:
    """What this server fetches. ``allowed`` is false where strangers could fill its disk."""

    def __init__(self) -> None:
        self.allowed = True
        self._known: dict[str, Download] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Download | None:
        return self._known.get(name)

    def start(self, name: str) -> None:
        """Fetch a published model. RequestError for any other, or where it is not allowed."""
        if not self.allowed or name not in PUBLISHED:
            raise RequestError(f"model={name}: this page does not fetch it")
        with self._lock:
            if any(download.running for download in self._known.values()):
                raise RequestError(f"model={name}: another model is being fetched; wait for it")
            process = subprocess.Popen(  # noqa: S603 ours, and a name of PUBLISHED
                [*_COMMAND, name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._known[name] = Download(name, process)

    def stop(self) -> None:
        """End what is under way; the next call of the command goes on where it was."""
        for download in self._known.values():
            if download.running:
                download.process.terminate()
                try:
                    download.process.wait(_GRACE)
                except subprocess.TimeoutExpired:
                    download.process.kill()
                    download.process.wait()


DOWNLOADS = Downloads()
