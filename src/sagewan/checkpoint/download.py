"""Fetching a published model: told before it starts, resumed where it stopped, checked by digest.

A file has its name only when it is whole and its digest is right; until then it is ``NAME.part``.
"""

import errno
import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sagewan.checkpoint.find import REPOSITORIES
from sagewan.checkpoint.hubs import Hub, RemoteFile, refuse_status
from sagewan.checkpoint.places import models_folder
from sagewan.errors import CheckpointError
from sagewan.plan.request import unknown_choice

if TYPE_CHECKING:
    import httpx

_CHUNK = 1 << 20
# Left free beside what is fetched, so that the system can go on.
_SPARE = 256 << 20
_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Download:
    """What is to be fetched, and where to; ``done`` bytes are here already."""

    name: str
    hub: Hub
    target: Path
    files: tuple[RemoteFile, ...]

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def done(self) -> int:
        return sum(_present(self.target / file.path, file) for file in self.files)


def repository_of(name: str) -> str:
    """The repository of a published model's name, or the one that is named ``owner/name``."""
    if name.count("/") == 1 and all(name.split("/")):
        return name
    if name not in REPOSITORIES:
        raise unknown_choice("name", name, REPOSITORIES)
    return REPOSITORIES[name]


def plan_download(name: str, hub: Hub, target: Path | None = None) -> Download:
    """The files of a model and where they go; asks the hub, fetches nothing.

    Raises CheckpointError if it can't be reached or has no such model, or if the disk is too full.
    """
    repository = repository_of(name)
    target = target or models_folder() / name.rpartition("/")[2]
    with _client(hub) as client:
        files = tuple(hub.files(client, repository))
    download = Download(name=name, hub=hub, target=target, files=files)
    _check_space(download)
    return download


def run_download(
    download: Download, on_bytes: Callable[[str, int], None], *, pause: float = 1.0
) -> Path:
    """Fetch what is missing; ``on_bytes`` is told of each file and the bytes that came.

    Broken connections are taken up again some times, after ``pause`` seconds and longer. Raises
    CheckpointError if that does not help, for a wrong digest, and when the disk is full; what came
    so far stays, and the next call goes on from there.
    """
    with _client(download.hub) as client:
        for file in download.files:
            path = download.target / file.path
            if _present(path, file) == file.size and path.exists():
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _fetch(client, file, path, on_bytes, pause)
            except OSError as error:
                raise _refused_by_disk(path, error) from error
    return download.target


def _client(hub: Hub) -> "httpx.Client":
    import httpx

    return httpx.Client(follow_redirects=True, timeout=30, headers=hub.headers)


def _check_space(download: Download) -> None:
    folder = download.target
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, download.total - download.done
    if free < needed + _SPARE:
        raise CheckpointError(
            f"{download.name} takes {needed / 1e9:.1f} GB more, and {folder} has "
            f"{free / 1e9:.1f} GB free: free some space, or choose another disk with --to"
        )


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _present(path: Path, file: RemoteFile) -> int:
    """Bytes of a file that are here, whole or in part."""
    for found in (path, _partial(path)):
        if found.is_file():
            size = found.stat().st_size
            return size if size <= file.size else 0
    return 0


def _fetch(
    client: "httpx.Client",
    file: RemoteFile,
    path: Path,
    on_bytes: Callable[[str, int], None],
    pause: float,
) -> None:
    import httpx

    partial = _partial(path)
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    for attempt in range(_ATTEMPTS):
        try:
            _fetch_rest(client, file, partial, on_bytes)
            break
        except httpx.TransportError as error:
            if attempt == _ATTEMPTS - 1:
                raise CheckpointError(
                    f"{file.url}: the connection broke {_ATTEMPTS} times "
                    f"({error or type(error).__name__}): run the same command again, it goes on "
                    "from there"
                ) from error
            time.sleep(pause * 2**attempt)
    _check_digest(partial, file)
    partial.replace(path)


def _fetch_rest(
    client: "httpx.Client",
    file: RemoteFile,
    partial: Path,
    on_bytes: Callable[[str, int], None],
) -> None:
    """Append what is missing; TransportError if the connection ends before the file does."""
    import httpx

    have = partial.stat().st_size if partial.exists() else 0
    if have == file.size and partial.exists():
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", file.url, headers=headers) as answer:
        if answer.status_code >= 500:
            raise httpx.RemoteProtocolError(f"the server failed with {answer.status_code}")
        refuse_status(answer.status_code, file.url)
        if answer.status_code != 206 and have:
            on_bytes(file.path, -have)  # a server that can't resume begins anew
            have = 0
        with partial.open("ab" if have else "wb") as out:
            # As the pieces come: gathered into larger ones, a broken connection would lose some.
            for chunk in answer.iter_raw():
                have += len(chunk)
                if have > file.size:
                    break
                out.write(chunk)
                on_bytes(file.path, len(chunk))
    if have > file.size:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise CheckpointError(
            f"{file.url} is longer than the {file.size} bytes that were announced: choose another "
            "source"
        )
    if have < file.size:
        raise httpx.RemoteProtocolError(f"it ended after {have} of {file.size} bytes")


def _check_digest(partial: Path, file: RemoteFile) -> None:
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
    if not file.sha256:
        digest.update(f"blob {file.size}\0".encode())
    with partial.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    wanted = file.sha256 or file.blob
    if digest.hexdigest() != wanted:
        partial.unlink()
        raise CheckpointError(
            f"{file.url} came with the digest {digest.hexdigest()[:12]}…, not {str(wanted)[:12]}…: "
            "it was removed; run the same command again, or choose another source"
        )


def _refused_by_disk(path: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full: {path} is not whole yet; free some space and run the same command "
            "again, it goes on from there"
        )
    return CheckpointError(f"{path} can't be written ({error.strerror or error}): use --to")
