"""The folder for what can be made again: self-tests, compiled kernels, the colours of previews."""

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """``SAGEWAN_CACHE``, or a folder of ours among the user's caches; it need not exist."""
    return Path(os.environ.get("SAGEWAN_CACHE") or platformdirs.user_cache_dir("sagewan"))


def write_whole(path: Path, data: bytes) -> None:
    """Beside, then renamed: a reader never sees half a file. Raises OSError."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
