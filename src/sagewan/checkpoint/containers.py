"""What kind of file of tensors it is: safetensors, GGUF or a PyTorch archive.

A file is known by its first bytes, never by its name. Only listing a PyTorch archive needs torch.
"""

from pathlib import Path

from sagewan.checkpoint.archive import open_archive
from sagewan.checkpoint.gguf_header import read_gguf
from sagewan.checkpoint.safetensors_header import read_safetensors
from sagewan.checkpoint.tensors import TensorFile
from sagewan.errors import CheckpointError


def open_file(path: Path) -> TensorFile:
    """The tensors of a file; CheckpointError, one sentence, for whatever else it is."""
    start = _start(path)
    if start.startswith(b"GGUF"):
        return read_gguf(path)
    if start.startswith(b"PK\x03\x04"):
        return open_archive(path)
    _refuse_other_files(start, path)
    return read_safetensors(path)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: fetch this file again") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from None


def _refuse_other_files(start: bytes, path: Path) -> None:
    """Name what people find in place of weights."""
    text = start.lstrip().lower()
    if not start:
        raise CheckpointError(f"{path} is empty: it is not a safetensors file; fetch it again")
    if b"version https://git-lfs".startswith(start[:23]):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page, not the weights: the site answered with an error or asked for "
            "a login; fetch the file itself"
        )
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise CheckpointError(
            f"{path} is a bare pickle, which could run any code when opened: fetch the "
            "safetensors file of this model"
        )
