"""Pictures from visitors: looked at, limited, and written anew, so that only pixels are kept."""

import hashlib
import io
import os
from pathlib import Path

from sagewan.errors import RequestError
from sagewan.jobs.records import default_path
from sagewan.pipeline.files import written_whole

# What a browser may send in one file, in bytes.
MAX_BYTES = 64 << 20


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
    kept = folder / "kept"
    if real.parent == kept and real.is_file():
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
    if not target.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as partial:
            partial.write_bytes(data)
    return target


def prepare_folder() -> None:
    """Tell gradio where to keep uploads. Call before gradio is imported."""
    folder = uploads_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
