"""``sagewan models``: the models on this machine, each in a line."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sagewan.checkpoint.experts import weight_files
from sagewan.checkpoint.find import REPOSITORIES, candidates, demo_folder
from sagewan.checkpoint.inspection import inspect
from sagewan.checkpoint.places import PART_FOLDERS, models_folder
from sagewan.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but the form of the answer."""
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(arguments: argparse.Namespace) -> int:
    """List what the names and the models folder hold."""
    found = [_row(name, path) for name, path in _found()]
    if arguments.json:
        print(json.dumps({"folder": str(models_folder()), "models": found}, indent=2))
        return 0
    for row in found:
        print(f"{row['name']}: {row['problem'] or row['summary']}  ({row['path']})")
    absent = sorted(REPOSITORIES.keys() - {row["name"] for row in found})
    if absent:
        print(f"not here: {', '.join(absent)} (sagewan download NAME)")
    print(f"models folder: {models_folder()}")
    return 0


def _found() -> Iterator[tuple[str, Path]]:
    """Name and place of each: the demo, the published ones, then whatever else is in the folder."""
    yield "demo", demo_folder()
    known = set()
    for name in REPOSITORIES:
        for path in candidates(name):
            known.add(path)
            if (path / "model_index.json").is_file():
                yield name, path
                break
    folder = models_folder()
    if folder.is_dir():
        known |= {folder / name for name in PART_FOLDERS}
        for path in sorted(one for one in folder.iterdir() if one.is_dir() and one not in known):
            yield path.name, path
        for path in weight_files(folder):
            yield path.name, path


def _row(name: str, path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "path": str(path), "summary": None, "problem": None}
    try:
        found = inspect(path)
    except CheckpointError as error:
        return {**row, "problem": str(error)}
    return {**row, "summary": found.summary(), "inspection": found.to_json()}
