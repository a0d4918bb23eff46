"""``sagewan bench``: what is measured, and what its figures depend on."""

import argparse
import datetime
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sagewan.plan.request import unknown_choice

if TYPE_CHECKING:
    from sagewan.plan.hardware import Device, Hardware

WHAT = {
    "attention": "attention, ours and others', on the same inputs",
    "step": "a whole denoising step, ours and diffusers', on the same inputs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and the flags of each."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, summary in WHAT.items():
        module = importlib.import_module(f"sagewan.cli.bench_{name}")
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(measure=module.run)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that everything measured has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N"
    )
    parser.add_argument("--emulate", action="store_true", help="emulated modes too, slow as it is")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 4 where one of our own was not right."""
    return int(arguments.measure(arguments))


def chosen_of(text: str, flag: str, known: Sequence[str]) -> tuple[str, ...]:
    """``a,b`` → the names; RequestError for one that is not known."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise unknown_choice(flag, name, known)
    return names


def about(device: "Device", hardware: "Hardware") -> dict[str, object]:
    """What the figures depend on."""
    return {
        "device": device.name,
        "driver": hardware.driver,
        "cuda": hardware.torch_cuda,
        "python": hardware.python,
        "packages": dict(hardware.packages),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
