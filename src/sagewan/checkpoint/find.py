"""A name or a path → the model it means. Reads JSON and file headers; imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

from platformdirs import user_data_path

from sagewan.checkpoint.files import read_json
from sagewan.checkpoint.folder import read_model
from sagewan.errors import CheckpointError
from sagewan.plan.models import DEMO, PUBLISHED, Model

# Where the published models live on the Hugging Face hub.
REPOSITORIES = {
    "wan2.1-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.1-i2v-14b": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan2.1-flf2v-14b": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    "wan2.2-t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}


def find_model(name_or_path: str, *, need_files: bool = True) -> Model:
    """The model called ``demo``, a published one by name, or the one in a diffusers folder.

    A published name is looked for in the models folder and in the Hugging Face cache; with
    ``need_files`` false its published values do where no files are found (``location`` is then
    None). Raises CheckpointError, one sentence with the fix, within some milliseconds.
    """
    if name_or_path == DEMO:
        return read_model(demo_folder(), DEMO)
    if name_or_path in PUBLISHED:
        return _published(name_or_path, need_files=need_files)
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111 Path's raises for ~nobody
    if path.is_dir():
        _refuse_original_layout(path)
        return read_model(path, path.resolve().name)
    if path.exists():
        raise CheckpointError(
            f"model={name_or_path} is a file; this version reads diffusers folders: "
            "choose a folder with model_index.json"
        )
    raise CheckpointError(
        f"model={name_or_path}: there is no such folder, and the names are "
        f"{', '.join((DEMO, *PUBLISHED))}"
    )


def demo_folder() -> Path:
    """The demo model that ships with the package."""
    return Path(str(resources.files("sagewan"))) / "assets" / "demo"


def models_folder() -> Path:
    """Where published models are looked for by name: ``SAGEWAN_MODELS``, or the user's data."""
    chosen = os.environ.get("SAGEWAN_MODELS")
    return Path(chosen).expanduser() if chosen else user_data_path("sagewan", False) / "models"


def _published(name: str, *, need_files: bool) -> Model:
    for folder in _candidates(name):
        if (folder / "model_index.json").exists():
            found = read_model(folder, name)
            return replace(found, family=PUBLISHED[name].family, sampling=PUBLISHED[name].sampling)
    if not need_files:
        return PUBLISHED[name]
    target = models_folder() / name
    raise CheckpointError(
        f"model={name}: its files are not here; fetch them with "
        f"hf download {REPOSITORIES[name]} --local-dir {target}"
    )


def _candidates(name: str) -> Iterator[Path]:
    repository = REPOSITORIES[name]
    yield models_folder() / name
    yield models_folder() / repository.rpartition("/")[2]
    cached = _hub_cache() / f"models--{repository.replace('/', '--')}"
    main = cached / "refs" / "main"
    if main.is_file():
        yield cached / "snapshots" / main.read_text(encoding="utf-8").strip()
    yield from sorted(cached.glob("snapshots/*"))


def _hub_cache() -> Path:
    """The cache's place, by the variables that huggingface_hub itself reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if chosen := os.environ.get(variable):
            return Path(chosen).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "huggingface" / "hub"


def _refuse_original_layout(path: Path) -> None:
    """Name the mistake of those who hold the same model in Wan-AI's own layout."""
    configs = (path / "config.json", path / "high_noise_model" / "config.json")
    config = next((file for file in configs if file.exists()), None)
    if (path / "model_index.json").exists() or config is None:
        return
    if read_json(config).get("_class_name") == "WanModel":
        raise CheckpointError(
            f"model={path} is in Wan-AI's original layout; this version reads the diffusers one: "
            "fetch the repository whose name ends in -Diffusers"
        )
