"""The files a visitor may choose from: named by the server, never by a path from the page."""

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from sagewan.checkpoint.find import demo_folder, find_model
from sagewan.checkpoint.inspection import inspect
from sagewan.checkpoint.places import LORAS, models_folder
from sagewan.errors import CheckpointError
from sagewan.plan.lora import EXPERTS, Lora
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


def model_facts(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ``sagewan inspect`` says of a model of :func:`model_choices`, fact by fact, and what is
    wrong with it; neither if its files are not here."""
    try:
        location = find_model(model_choices().get(name, DEMO), need_files=False).location
    except CheckpointError as error:
        return (name,), (str(error),)
    if location is None:
        return (), ()
    return _inspected(location, location.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _inspected(location: Path, _: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        found = inspect(location)
    except CheckpointError as error:
        return (location.name,), (str(error),)
    return found.facts(), tuple(found.problems)


def lora_choices() -> Mapping[str, Lora]:
    """The demo model's own LoRA files, and those in the models folder's ``loras``, each by its name
    for all of a model, and as ``high=NAME`` and ``low=NAME`` for one expert."""
    found = [Lora(path=path) for path in _demo_loras()]
    for path in _lora_files(models_folder()):
        found += [Lora(path=path, expert=expert) for expert in (None, *EXPERTS)]
    return {lora_name(lora): lora for lora in found}


@cache
def _demo_loras() -> tuple[Path, ...]:
    return tuple(_lora_files(demo_folder()))


def _lora_files(folder: Path) -> list[Path]:
    return [one for one in _entries(folder / LORAS) if one.suffix == ".safetensors"]


def lora_name(lora: Lora) -> str:
    """What a LoRA is called on the page, whatever its strength. One in the models folder that has
    the name of one of the demo model's has its folder before it."""
    own, name = _demo_loras(), lora.path.name
    if lora.path not in own and name in {path.name for path in own}:
        name = f"{LORAS}/{name}"
    return f"{lora.expert}={name}" if lora.expert else name


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
