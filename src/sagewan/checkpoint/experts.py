"""Which files are the transformers of a model: one, or the two experts of Wan 2.2 A14B.

Nothing inside tells a high-noise expert from a low-noise one, so the names of files and folders do.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from sagewan.checkpoint.architecture import Architecture
from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.files import read_json
from sagewan.checkpoint.infer import config_of
from sagewan.checkpoint.roles import ROLES, TRANSFORMER
from sagewan.checkpoint.source import Source, open_source
from sagewan.checkpoint.whole import check_whole
from sagewan.errors import CheckpointError

HIGH, LOW = "high", "low"
# Wan-AI's own folders of the two.
_FOLDERS = ("high_noise_model", "low_noise_model")
_WORD = re.compile(r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)", re.IGNORECASE)
# What the name of an expert says beside "high" or "low".
_OF_A14B = re.compile(r"noise|2[._]2|a14b", re.IGNORECASE)
WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".sft", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The transformers of a model, high noise first if there are two, and their one shape."""

    paths: tuple[Path, ...]
    sources: tuple[Source, ...]
    architecture: Architecture
    notes: tuple[str, ...] = ()


def find_experts(path: Path) -> Experts:
    """The transformers in a file, in a folder of files, or in Wan-AI's original folder.

    Raises CheckpointError if there is none, if there are several models, or if an expert lacks
    the other.
    """
    paths = _in_folder(path) if path.is_dir() else (path,)
    if len(paths) == 1:
        paths = _with_partner(paths[0])
    sources = tuple(open_source(one, TRANSFORMER) for one in paths)
    shapes = [Architecture.of(config_of(one), one.path) for one in sources]
    for source, shape in zip(sources, shapes, strict=True):
        check_whole(source, shape.shapes())
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{paths[0]} and {paths[1].name} have different shapes, so they are not the two "
            "experts of one model: keep only one pair in this folder"
        )
    if len(paths) == 1 and _must_be_a_half(shapes[0]):
        raise CheckpointError(_alone(paths[0]))
    notes: tuple[str, ...] = ()
    if len(paths) == 2:
        names = [_told(one) for one in paths]
        notes = (f"by their names, {names[0]} is the high-noise expert and {names[1]} the other",)
    return Experts(paths=paths, sources=sources, architecture=shapes[0], notes=notes)


def noise_in_name(path: Path) -> str | None:
    """``high`` or ``low``, as the name of the file or, failing that, of its folder says."""
    for name in (path.name, path.parent.name):
        if found := _WORD.search(name):
            return found[1].lower()
    return None


def _must_be_a_half(architecture: Architecture) -> bool:
    """Only A14B takes a picture's latents without CLIP's view of the picture."""
    return architecture.in_channels > architecture.out_channels and architecture.image_dim is None


def _with_partner(path: Path) -> tuple[Path, ...]:
    noise = noise_in_name(path)
    if noise is None:
        return (path,)
    partner = _partner(path, noise)
    if partner is not None:
        return (path, partner) if noise == HIGH else (partner, path)
    if _OF_A14B.search(path.name):
        raise CheckpointError(_alone(path))
    return (path,)


def _partner(path: Path, noise: str) -> Path | None:
    """The other expert: of the same name with the other word, or the only one beside it."""

    def other(found: re.Match[str]) -> str:
        word = LOW if noise == HIGH else HIGH
        first = found[1]
        return word.upper() if first.isupper() else word.title() if first[0].isupper() else word

    renamed = path.with_name(_WORD.sub(other, path.name))
    if renamed != path and renamed.exists():
        return renamed
    folder = path.parent.with_name(_WORD.sub(other, path.parent.name))
    if renamed == path and folder != path.parent and (folder / path.name).exists():
        return folder / path.name
    words = {HIGH, LOW} - {noise}
    others = [one for one in _transformers_in(path.parent) if noise_in_name(one) in words]
    return others[0] if len(others) == 1 else None


def _alone(path: Path) -> str:
    noise = noise_in_name(path)
    if noise is None:
        return (
            f"model={path} is one of the two experts of Wan 2.2 A14B and its name does not say "
            "which: put both in one folder, with high_noise and low_noise in their names"
        )
    missing = LOW if noise == HIGH else HIGH
    return (
        f"model={path} is by its name the {noise}-noise expert of Wan 2.2 A14B, and the "
        f"{missing}-noise one is not beside it: put it there, with {missing}_noise in its name"
    )


def _told(path: Path) -> str:
    return path.name if _WORD.search(path.name) else f"{path.parent.name}/{path.name}"


def _in_folder(folder: Path) -> tuple[Path, ...]:
    halves = tuple(folder / name for name in _FOLDERS)
    present = [half for half in halves if half.is_dir()]
    if present:
        if len(present) < 2:
            raise CheckpointError(f"{folder} lacks the folder {_lacking(halves)}: fetch it again")
        return halves
    config = folder / "config.json"
    if config.exists() and read_json(config).get("_class_name") == "WanModel":
        return (folder,)
    if any(folder.glob("*.safetensors.index.json")) or any(folder.glob("non_block.safetensors")):
        return (folder,)
    found = _transformers_in(folder)
    if not found:
        raise CheckpointError(
            f"model={folder}: this folder has no model_index.json, so it is not a diffusers "
            "folder, and none of its files is a transformer of Wan; choose the folder or the file "
            "that is"
        )
    noises = [noise_in_name(path) for path in found]
    if len(found) == 2 and set(noises) == {HIGH, LOW}:
        return tuple(sorted(found, key=lambda path: noise_in_name(path) == LOW))
    if len(found) > 1:
        raise CheckpointError(
            f"model={folder} holds {len(found)} transformers, such as {found[0].name} and "
            f"{found[1].name}: name the file"
        )
    return (found[0],)


def _lacking(halves: tuple[Path, ...]) -> str:
    return next(half.name for half in halves if not half.is_dir())


def _transformers_in(folder: Path) -> list[Path]:
    return [path for path in weight_files(folder) if _is_transformer(path)]


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights by their endings; those that open at once first."""
    try:
        inside = list(folder.iterdir())
    except OSError:
        return []  # a folder that may not be looked into holds nothing for us
    found = [path for path in inside if path.suffix.lower() in WEIGHTS and path.is_file()]
    return sorted(found, key=lambda path: (WEIGHTS.index(path.suffix.lower()), path.name))


def _is_transformer(path: Path) -> bool:
    if path.suffix.lower() not in WEIGHTS[:2]:
        return False
    try:
        return ROLES[TRANSFORMER].found_in(open_file(path).tensors.keys()) is not None
    except CheckpointError:
        return False
