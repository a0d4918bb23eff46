"""PyTorch's ``.pth`` and ``.pt`` files: a zip archive of a pickle and the tensors' bytes.

A pickle can name any function to be called when it is opened. So the names are read first, without
opening it, and a file that wants more than tensors is refused; torch then opens it with
``weights_only``, which allows no more either.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan.checkpoint.tensors import ITEM_BYTES, Stored, TensorFile, check_name, told
from sagewan.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# What a pickle of a state dict calls: tensors, their storages, and the dict itself.
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch serialization._get_layout",
    "torch Size",
    "torch storage.UntypedStorage",
}
_STORAGES = "Storage"
_MAX_PICKLE = 64 << 20
# Files of a training run keep the weights under one of these.
_NESTED = ("state_dict", "model_state_dict", "module", "model")


class _Archive(TensorFile):
    """An archive that torch has opened; its tensors stay in the file's pages."""

    def __init__(self, path: Path, loaded: "dict[str, torch.Tensor]") -> None:
        super().__init__(path, "pth")
        self._loaded = loaded
        for name, tensor in loaded.items():
            self.tensors[name] = Stored(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                nbytes=tensor.nbytes,
                offset=0,
                file=self,
            )

    def head(self, stored: Stored, count: int) -> bytes:
        import torch

        data = self._loaded[stored.name].contiguous().view(-1)[:count]
        return bytes(data.view(torch.uint8)[:count].numpy())

    def tensor(self, stored: Stored) -> "torch.Tensor":
        return self._loaded[stored.name]


def open_archive(path: Path) -> TensorFile:
    """The tensors of a PyTorch archive; CheckpointError if it holds anything else, which is then
    not run."""
    _check_pickle(path)
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Damaged archives end in RuntimeError, UnpicklingError, EOFError, KeyError, and more.
    except Exception as error:
        raise CheckpointError(
            f"{path} can't be opened as weights ({type(error).__name__}): fetch it again, or "
            "the safetensors file of this model"
        ) from error
    return _Archive(path, _state_dict(loaded, path))


def is_archive(path: Path) -> bool:
    """Whether a file begins as PyTorch's archives do."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # whoever opens it says why it can't be


def texts_in(path: Path) -> set[str]:
    """Every text in an archive's pickle, the names of its tensors among them, without opening it:
    quick, and needs no torch. CheckpointError if it is no archive."""
    return {str(argument) for name, argument in _opcodes(path) if "UNICODE" in name}


def _opcodes(path: Path) -> list[tuple[str, Any]]:
    """What an archive's pickle would do, step by step; nothing of it is done."""
    try:
        return [(code.name, argument) for code, argument, _ in pickletools.genops(_pickle(path))]
    # zipfile and pickletools raise BadZipFile, ValueError, EOFError and others by the damage.
    except Exception as error:
        raise CheckpointError(
            f"{path} is a damaged archive, is cut short, or is none of PyTorch's: fetch it again"
        ) from error


def _check_pickle(path: Path) -> None:
    for name in _named(path):
        if name not in _ALLOWED and not (name.startswith("torch ") and name.endswith(_STORAGES)):
            raise CheckpointError(
                f"{path} would run code when opened ({told(name.replace(' ', '.'))}), so it was "
                "not: fetch the safetensors file of this model"
            )


def _pickle(path: Path) -> bytes:
    """The archive's one pickle; ValueError if there is none, or one too large to be a list."""
    with zipfile.ZipFile(path) as archive:
        (member,) = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if member.file_size > _MAX_PICKLE:
            raise ValueError(member.file_size)
        return archive.read(member)


def _named(path: Path) -> list[str]:
    """What the pickle would import, as ``module name``."""
    found = []
    for opcode, argument in _opcodes(path):
        if opcode in ("GLOBAL", "INST"):
            found.append(str(argument))
        elif opcode in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            # Its name is put together as it runs; torch writes none of these.
            found.append(opcode)
    return found


def _state_dict(loaded: Any, path: Path) -> "dict[str, torch.Tensor]":
    import torch

    if isinstance(loaded, dict):
        nested = next((loaded[key] for key in _NESTED if isinstance(loaded.get(key), dict)), loaded)
        tensors = {
            check_name(str(name), path): tensor.detach()
            for name, tensor in nested.items()
            if isinstance(tensor, torch.Tensor)
            and str(tensor.dtype).removeprefix("torch.") in ITEM_BYTES
        }
        if tensors:
            return tensors
    raise CheckpointError(f"{path} holds no weights by name: choose another file")
