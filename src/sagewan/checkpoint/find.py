"""A name or a path → the model it means. Reads JSON and file headers; imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

from sagewan.checkpoint.assemble import assemble
from sagewan.checkpoint.calibration import find_calibration
from sagewan.checkpoint.folder import TRANSFORMERS, read_model
from sagewan.checkpoint.places import hub_cache, models_folder
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
    """The model called ``demo``, a published one by name, or the one in a folder or a file.

    A published name is looked for in the models folder and in the Hugging Face cache; with
    ``need_files`` false its published values do where no files are found (``location`` is then
    None), and a file's own do where other parts of its model are missing. Raises CheckpointError,
    one sentence with the fix, within some milliseconds.
    """
    model = _found(name_or_path, need_files=need_files)
    places = {part: find_calibration(model.parts[part]) for part in _transformers(model)}
    return replace(model, measured={part: path for part, path in places.items() if path})


def _transformers(model: Model) -> list[str]:
    return [part for part in TRANSFORMERS if part in model.parts]


def _found(name_or_path: str, *, need_files: bool) -> Model:
    if name_or_path == DEMO:
        return read_model(demo_folder(), DEMO)
    if name_or_path in PUBLISHED:
        return _published(name_or_path, need_files=need_files)
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111 Path's raises for ~nobody
    if (path / "model_index.json").exists():
        return read_model(path, path.resolve().name)
    if path.exists():
        name = path.name if path.is_file() else path.resolve().name
        return assemble(path, name, need_files=need_files)
    raise CheckpointError(
        f"model={name_or_path}: there is no such folder or file, and the names are "
        f"{', '.join((DEMO, *PUBLISHED))}"
    )


def demo_folder() -> Path:
    """The demo model that ships with the package."""
    return Path(str(resources.files("sagewan"))) / "assets" / "demo"


def _published(name: str, *, need_files: bool) -> Model:
    for folder in candidates(name):
        if (folder / "model_index.json").exists():
            found = read_model(folder, name)
            return replace(found, family=PUBLISHED[name].family, sampling=PUBLISHED[name].sampling)
    if not need_files:
        return PUBLISHED[name]
    raise CheckpointError(
        f"model={name}: its files are not here; fetch them with "
        f"sagewan download {name} --from hf (or modelscope)"
    )


def candidates(name: str) -> Iterator[Path]:
    """The folders in which a published model may be."""
    repository = REPOSITORIES[name]
    yield models_folder() / name
    yield models_folder() / repository.rpartition("/")[2]
    cached = hub_cache() / f"models--{repository.replace('/', '--')}"
    main = cached / "refs" / "main"
    if main.is_file():
        yield cached / "snapshots" / main.read_text(encoding="utf-8").strip()
    yield from sorted(cached.glob("snapshots/*"))
