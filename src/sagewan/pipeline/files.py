"""The files a run writes: refused early where they can't be written, and whole or not at all."""

import contextlib
import errno
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sagewan.errors import RequestError
from sagewan.plan.request import Request

VIDEO_SUFFIX = ".mp4"

# H.264 at the quality we write takes at most about this many bytes a pixel: noise, the worst case.
_BYTES_PER_PIXEL = 0.5
_SPARE_BYTES = 1 << 20


def check_outputs(request: Request) -> None:
    """RequestError if the video or the report can't be written where the request says."""
    if request.output.suffix.lower() != VIDEO_SUFFIX:
        better = request.output.with_suffix(VIDEO_SUFFIX) if request.output.name else "video.mp4"
        raise RequestError(f"output={request.output}: videos are written as .mp4; use {better}")
    check_file("output", request.output)
    if request.report:
        check_file("report", request.report)
        if _same(request.report, request.output):
            raise RequestError(f"report and output are both {request.report}: name two files")
        if _same(request.report, request.image) or _same(request.report, request.last_image):
            raise RequestError(f"report={request.report} is the input picture: name another file")


def _same(path: Path, other: Path | None) -> bool:
    """Whether two names, however written, are one file."""
    return other is not None and path.resolve() == other.resolve()


def check_space(output: Path, size: tuple[int, int], frames: int) -> None:
    """RequestError if the disk is too full for a video of this size (pixels) and length."""
    needed = int(size[0] * size[1] * frames * _BYTES_PER_PIXEL) + _SPARE_BYTES
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise RequestError(
            f"output={output}: the disk has {free / 1e6:.0f} MB free and the video may take "
            f"{needed / 1e6:.0f} MB; free some space, or choose a folder on another disk"
        )


def check_file(name: str, path: Path) -> None:
    """RequestError if no file can be written to the path that was given as ``name``."""
    try:
        folder = path.absolute().parent
        if path.is_dir():
            raise RequestError(f"{name}={path} is a folder: name a file in it")
        if not folder.exists():
            raise RequestError(
                f"{name}={path}: the folder {folder} does not exist; create it, or choose another"
            )
        if path.exists() and not path.is_file():
            raise RequestError(f"{name}={path} is not an ordinary file: name another")
        # Only trying tells: permissions say nothing about read-only disks and special folders.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(
            f"{name}={path} can't be written ({error.strerror}); choose another folder or name"
        ) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it becomes ``path`` at the end, or is removed.

    A full disk becomes a RequestError, as any other refusal of the system to write it.
    """
    # A short name of its own: the wanted one may be as long as names can be.
    partial = path.absolute().parent / f".sagewan-{secrets.token_hex(6)}.part"
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _refusal(path: Path, error: OSError) -> RequestError:
    if error.errno == errno.ENOSPC:
        return RequestError(
            f"the disk is full: {path} could not be written and nothing was left behind; free "
            "some space, or choose a folder on another disk"
        )
    return RequestError(
        f"{path} could not be written ({error.strerror or error}); choose another folder or name"
    )
