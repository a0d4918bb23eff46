"""Pictures from visitors: looked at, limited, and written anew, so that only pixels are kept; and
removed when nothing names them any more."""

import contextlib
import hashlib
import io
import logging
import os
import sqlite3
import threading
import time
from pathlib import Path

from sagewan.errors import RequestError
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import default_path
from sagewan.pipeline.files import written_whole

logger = logging.getLogger(__name__)

# The folder of the pictures that were written anew.
_KEPT = "kept"
# What a browser may send in one file, in bytes.
MAX_BYTES = 64 << 20
# Seconds that an upload is left alone: it may belong to a form that is being filled in.
_FRESH = 24 * 3600.0
# Seconds from the start to the first look at what is there, and from one to the next.
_FIRST_SWEEP, _SWEEPS = 60.0, 6 * 3600.0


def uploads_folder() -> Path:
    """Where gradio puts what browsers send, and where the kept pictures are."""
    return default_path().parent / "uploads"


def kept_picture(path: Path, field: str) -> Path:
    """A picture that the browser sent → the same as a PNG of ours. Of an animation the first frame
    is kept, which is the only one that is decoded; nothing but pixels survives.

    Raises RequestError for a file that did not come from the browser, is no picture, or has too
    many pixels or bytes.
    """
    from sagewan.pipeline.pictures import open_picture

    folder = uploads_folder().resolve()
    real = path.resolve()
    if not real.is_relative_to(folder):
        raise RequestError(f"{field}: choose the picture again")
    kept = folder / _KEPT
    if real.parent == kept and real.is_file():
        os.utime(real)
        return real
    if real.is_file() and real.stat().st_size > MAX_BYTES:
        raise RequestError(f"{field}: the file has more than {MAX_BYTES >> 20} MB: make it smaller")
    try:
        picture = open_picture(real, field)
    except RequestError as error:
        # The visitor knows the file by another name than the server.
        raise RequestError(str(error).replace(f"{field}={real}", f"{field}={real.name}")) from None
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    data = file.getvalue()
    target = kept / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    if target.exists():
        os.utime(target)
    else:
        kept.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as partial:
            partial.write_bytes(data)
    return target


def prepare_folder() -> None:
    """Tell gradio where to keep uploads. Call before gradio is imported."""
    folder = uploads_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)


def sweep(queue: Queue, *, older: float = _FRESH) -> int:
    """Remove what browsers sent more than ``older`` seconds ago and what no job and no form names,
    and the folders that gradio made for it; how many files that were."""
    # From before the look at the jobs: what is named afterwards was touched then.
    until = time.time() - older
    named = queue.named_files()
    removed = 0
    for path in _below(uploads_folder()):
        if named.isdisjoint((str(path), str(path.resolve()))):
            # It may have been touched, or removed, in the meantime.
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < until:
                    path.unlink()
                    removed += 1
    _remove_empty_folders(uploads_folder(), until)
    return removed


def _remove_empty_folders(folder: Path, until: float) -> None:
    """Those below it that were last changed before this time: into a newer one a file is written
    now."""
    for root, _, _ in os.walk(folder, topdown=False):
        path = Path(root)
        # One that is not empty, or is no more, can't be removed.
        with contextlib.suppress(OSError):
            if path not in (folder, folder / _KEPT) and path.stat().st_mtime < until:
                path.rmdir()


def _below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def keep_swept(stopping: threading.Event) -> None:
    """Sweep now and then, until told to stop."""
    pause = _FIRST_SWEEP
    while not stopping.wait(pause):
        pause = _SWEEPS
        try:
            with Queue(default_path()) as queue:
                sweep(queue)
        except (OSError, sqlite3.Error) as error:
            logger.warning("uploads were not looked through: %s", error)
