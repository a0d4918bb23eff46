"""The files a visitor may choose from: named by the server, never by a path from the page."""

from collections.abc import Mapping
from pathlib import Path

from sagewan.checkpoint.places import models_folder
from sagewan.plan.models import DEMO, PUBLISHED

_FILES = (".safetensors", ".gguf")


def model_choices() -> Mapping[str, str]:
    """What to show of each model → what a request calls it: the names, and whatever lies in the
    models folder."""
    choices = {name: name for name in (DEMO, *PUBLISHED)}
    for path in _entries(models_folder()):
        is_model = (path / "model_index.json").is_file() or path.suffix in _FILES
        if is_model and path.name not in choices:
            choices[path.name] = str(path)
    return choices


def lora_paths() -> Mapping[str, Path]:
    """The LoRA files in the models folder's ``loras``, by name."""
    return {
        path.name: path
        for path in _entries(models_folder() / "loras")
        if path.suffix == ".safetensors"
    }


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
