"""Where the parts of a model that a single file lacks are looked for: in the file itself, beside
it, in the models folder and in the Hugging Face cache."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_path

from sagewan.checkpoint.archive import is_archive, texts_in
from sagewan.checkpoint.experts import weight_files
from sagewan.checkpoint.files import read_json, tensor_files
from sagewan.checkpoint.roles import ROLES
from sagewan.checkpoint.source import Source, source_of
from sagewan.errors import CheckpointError

# Where ComfyUI, diffusers and Wan-AI keep each part, beside the transformer or beside its folder.
_SUBFOLDERS = {
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "text_encoders", "clip"),
    "image_encoder": ("image_encoder", "clip_vision"),
    "tokenizer": ("tokenizer", "google/umt5-xxl", "umt5-xxl"),
    "image_processor": ("image_processor",),
}
# The app offers what lies there, in the models folder.
LORAS = "loras"
# Folders that may stand among the models and are none.
PART_FOLDERS = frozenset({LORAS, *(name for names in _SUBFOLDERS.values() for name in names)})
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def models_folder() -> Path:
    """Where published models are looked for by name: ``SAGEWAN_MODELS``, or the user's data."""
    chosen = os.environ.get("SAGEWAN_MODELS")
    return Path(chosen).expanduser() if chosen else user_data_path("sagewan", False) / "models"


def hub_cache() -> Path:
    """The cache's place, by the variables that huggingface_hub itself reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if chosen := os.environ.get(variable):
            return Path(chosen).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "huggingface" / "hub"


@dataclass
class Search:
    """A search for the parts of one model, around ``path``. ``complaints`` are what was wrong with
    files that could have been a part."""

    path: Path
    complaints: list[str] = field(default_factory=list)

    def weights(self, role: str, fits: Callable[[Source], bool]) -> Source | None:
        """The first part of this role that fits."""
        for candidate in self._candidates(role):
            source = self._opened(candidate, role)
            if source is not None and fits(source):
                return source
        return None

    def tokenizer(self, near: Path) -> Path | None:
        """The folder of UMT5's tokenizer, nearest to its weights if it lies there."""
        for place in (*_around(near), *self._places()):
            for name in ("", *_SUBFOLDERS["tokenizer"]):
                folder = place / name
                if any((folder / file).is_file() for file in _TOKENIZER_FILES):
                    return folder
        return None

    def image_processor(self, near: Path) -> Path | None:
        """The folder of the settings by which pictures are made ready for CLIP."""
        for place in _around(near):
            folder = place / "image_processor"
            if (folder / "preprocessor_config.json").is_file():
                return folder
        return None

    def looked_in(self) -> str:
        """The places in words."""
        beside = self.path if self.path.is_dir() else self.path.parent
        return f"beside it in {beside}, in {models_folder()}, and in the Hugging Face cache"

    def _candidates(self, role: str) -> Iterator[Path]:
        if self.path.is_file():
            yield self.path
        for place in self._places():
            yield from weight_files(place)
            for name in _SUBFOLDERS[role]:
                folder = place / name
                if (folder / "config.json").is_file():
                    yield folder
                if folder.is_dir():
                    yield from weight_files(folder)

    def _places(self) -> Iterator[Path]:
        found: dict[Path, None] = dict.fromkeys(_around(self.path))
        models = models_folder()
        for folder in (models, *_folders_in(models), *_snapshots(hub_cache())):
            found.setdefault(folder)
        yield from (folder for folder in found if folder.is_dir())

    def _opened(self, candidate: Path, role: str) -> Source | None:
        config = candidate / "config.json"
        try:
            if not _may_be(role, candidate):
                return None
            files = tensor_files(candidate)
            return source_of(
                files, candidate, role, read_json(config) if config.is_file() else None
            )
        except CheckpointError as error:
            if role in candidate.name.lower():
                self.complaints.append(str(error))
            return None


def _may_be(role: str, candidate: Path) -> bool:
    """False for an archive of another part: to open it would take torch, and its names do not."""
    if not candidate.is_file() or not is_archive(candidate):
        return True
    return ROLES[role].found_in(texts_in(candidate)) is not None


def _around(path: Path) -> Iterator[Path]:
    """The folder of a file, and the one that holds it if that is made of parts."""
    folder = path if path.is_dir() else path.parent
    yield folder
    yield folder.parent


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())


def _snapshots(cache: Path) -> Iterator[Path]:
    yield from sorted(cache.glob("models--*[wW]an*/snapshots/*"))
    yield from sorted(cache.glob("models--*umt5*/snapshots/*"))
