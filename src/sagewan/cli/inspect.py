"""``sagewan inspect``: what a file or a folder is, and what is wrong with it."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.inspection import Inspection, Part, inspect
from sagewan.errors import CheckpointError, RequestError
from sagewan.plan.counted import counted
from sagewan.plan.models import DEMO, PUBLISHED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The path, or a model's name."""
    parser.add_argument("path", metavar="FILE|DIR", help="a file, a folder, or a model's name")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; exit code 2 if it has problems."""
    found = inspect(_path(arguments.path))
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_inspection(found)
    return RequestError.exit_code if found.problems else 0


def _path(text: str) -> Path:
    if text == DEMO or text in PUBLISHED:
        location = find_model(text).location
        if location is not None:
            return location
    path = Path(os.path.expanduser(text))  # noqa: PTH111 Path's raises for ~nobody
    if not path.exists():
        raise CheckpointError(f"{text}: there is no such file or folder")
    return path


def print_inspection(found: Inspection) -> None:
    """As a table, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "path", found.path
    name = f": {found.name} ({found.family})" if found.name else ""
    yield "kind", found.kind.replace("_", " ") + name
    if found.tasks:
        yield "tasks", ", ".join(found.tasks)
    for part in found.parts:
        yield part.role.replace("_", " "), f"{part.description}; {_weights(part)}"
        yield "", _format(part)
        for note in part.notes:
            yield "", note
    for note in found.notes:
        yield "note", note
    if found.missing:
        yield "missing", found.missing
    for problem in found.problems:
        yield "problem", problem


def _weights(part: Part) -> str:
    return (
        f"{part.parameters / 1e6:.1f} million parameters, {part.bytes / 1e6:.1f} MB in "
        f"{counted(part.files, 'file')} ({part.container}, {part.layout} names)"
    )


def _format(part: Part) -> str:
    text = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in part.formats.items())
    if part.role == "lora":
        return part.format
    if part.quantized:
        text += f"; {part.quantized} of {part.matrices} matrices quantized, scales {part.scales}"
    if part.full_precision:
        text += f", {part.full_precision} to be multiplied in 16 bit"
    return text
