"""``sagewan download``: fetch a published model; nothing else in the program does."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sagewan.checkpoint.download import Download, plan_download, run_download
from sagewan.checkpoint.find import REPOSITORIES
from sagewan.checkpoint.hubs import HF, Hub
from sagewan.checkpoint.inspection import inspect
from sagewan.cli.streams import say
from sagewan.plan.counted import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, from where, where to."""
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(REPOSITORIES)}, or OWNER/NAME")
    parser.add_argument(
        "--from",
        dest="source",
        default=HF,
        metavar="SOURCE",
        help="hf (with HF_ENDPOINT and HF_TOKEN if set), modelscope, or a mirror's https:// (hf)",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="a folder of its own")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be fetched, and how much"
    )


def run(arguments: argparse.Namespace) -> int:
    """Say what is to come, fetch it, and say what it is."""
    hub = Hub.parse(arguments.source)
    download = plan_download(arguments.name, hub, arguments.to)
    say(_announcement(download))
    if arguments.dry_run:
        for file in download.files:
            print(f"{file.size:>14,}  {file.path}")
        return 0
    with _progress(download) as on_bytes:
        folder = run_download(download, on_bytes)
    print(f"{folder}: {inspect(folder).summary()}")
    return 0


def _announcement(download: Download) -> str:
    rest = download.total - download.done
    here = f", {download.done / 1e9:.2f} GB of it here already" if download.done else ""
    return (
        f"{download.name} from {download.hub.endpoint}: {counted(len(download.files), 'file')}, "
        f"{download.total / 1e9:.2f} GB{here}; {rest / 1e9:.2f} GB to fetch into {download.target}"
    )


@contextmanager
def _progress(download: Download) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal, a line for each tenth elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines(download)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(download.name, total=download.total, completed=download.done)

        def advance(path: str, count: int) -> None:
            progress.update(task, advance=count, description=path)

        yield advance


class _Lines:
    """Says how far it is at each tenth of the whole."""

    def __init__(self, download: Download) -> None:
        self._total, self._done = max(download.total, 1), download.done

    def __call__(self, path: str, count: int) -> None:
        before, self._done = self._done, self._done + count
        if self._done * 10 // self._total > before * 10 // self._total:
            say(f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB ({path})")
