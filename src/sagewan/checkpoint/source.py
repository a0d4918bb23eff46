"""The weights of one part of a model, by diffusers' names, whatever file they are in.

:func:`open_source` reads headers; :meth:`Source.read` one weight at a time, from pages that the
system maps in and lets go. Nothing here unpacks: a quantised matrix stays as it is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan.checkpoint.files import read_json, tensor_files
from sagewan.checkpoint.layers import Weight, is_beside, weights_of
from sagewan.checkpoint.roles import ROLES, Role
from sagewan.checkpoint.scales import check_scales
from sagewan.checkpoint.tensors import Stored, TensorFile, all_tensors
from sagewan.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from sagewan.checkpoint.packed import Packed


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One weight: ``name`` as diffusers has it, ``format`` as torch names a dtype or as
    :class:`sagewan.checkpoint.packed.Packed` does, ``bytes`` with its scales. It is ``index`` of
    ``joined`` equal parts of a tensor that the file holds joined along its rows."""

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    weight: Weight = field(repr=False)
    index: int = 0
    joined: int = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """A part's weights on disk. ``layout`` is whose names they have there; ``config`` the JSON
    beside them, if any; ``files`` what they are in."""

    path: Path
    role: str
    layout: str
    config: Mapping[str, Any] | None
    entries: Mapping[str, Entry]
    files: tuple[TensorFile, ...] = field(repr=False)
    unknown: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight, None if there is none of this name."""
        entry = self.entries.get(name)
        return entry.shape if entry else None

    def read(self, name: str) -> "torch.Tensor | Packed":
        """A weight as it is stored: a tensor in the file's dtype, or packed with its scales.

        On the CPU. Raises CheckpointError if its scales can't be right.
        """
        from sagewan.checkpoint.reading import read_weight

        entry = self.entries[name]
        found = read_weight(entry.weight)
        if entry.joined == 1:
            return found
        from torch import Tensor

        if not isinstance(found, Tensor):
            raise CheckpointError(
                f"{self.path}: {entry.weight.data.name} is quantised, which joined weights are not "
                "read from: choose another file"
            )
        return found.chunk(entry.joined)[entry.index]


def open_source(path: Path, role: str) -> Source:
    """The weights of this part in a file, or in a folder of files.

    Raises CheckpointError, one sentence, if they are missing, damaged, quantised in a way that is
    not read, or another part's.
    """
    files = tensor_files(path)
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    return source_of(files, path, role, read_json(config) if config.exists() else None)


def source_of(
    files: list[TensorFile], path: Path, role: str, config: Mapping[str, Any] | None = None
) -> Source:
    """As :func:`open_source`, of files that are open already."""
    part = ROLES[role]
    tensors = all_tensors(files)
    found = part.found_in(tensors.keys())
    if found is None:
        raise CheckpointError(what_else(path, tensors, role))
    prefix, layout = found
    own = {
        name.removeprefix(prefix): stored
        for name, stored in tensors.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(part.unused)
    }
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    weights = weights_of(own, metadata, path, prefix)
    check_scales(weights.values())
    entries, unknown = _entries(weights, part, layout, path)
    return Source(
        path=path,
        role=role,
        layout=layout,
        config=config,
        entries=entries,
        files=tuple(files),
        unknown=unknown,
    )


def what_else(path: Path, tensors: Mapping[str, Stored], role: str) -> str:
    """What a file is that does not hold this part."""
    names = tensors.keys()
    wanted = role.replace("_", " ")
    if any(".lora_" in name or name.startswith("lora_") for name in names):
        return f"{path} is a LoRA, not a {wanted}: give it to --lora"
    for other in ROLES.values():
        if other.found_in(names):
            return f"{path} is a {other.name.replace('_', ' ')} of Wan, not a {wanted}"
    return f"{path} holds no {wanted} of Wan: it is of another model"


def _entries(
    weights: Mapping[str, Weight], part: Role, layout: str, path: Path
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    entries: dict[str, Entry] = {}
    unknown = []
    for name, renamed in part.rename(weights.keys(), layout).items():
        weight = weights[name]
        if not renamed and not is_beside(name):
            unknown.append(name)
        for index, new in enumerate(renamed):
            if new in entries:
                raise CheckpointError(f"{path} holds {new} twice, as {name} too: fetch it again")
            entries[new] = _entry(new, weight, index, len(renamed))
    return entries, tuple(unknown)


def _entry(name: str, weight: Weight, index: int, joined: int) -> Entry:
    shape = weight.shape
    return Entry(
        name=name,
        shape=(shape[0] // joined, *shape[1:]) if joined > 1 else shape,
        format=weight.format,
        bytes=weight.nbytes // joined,
        weight=weight,
        index=index,
        joined=joined,
    )
