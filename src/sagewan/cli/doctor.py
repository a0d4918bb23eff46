"""``sagewan doctor``: what this machine can run, tried and timed, and why not, else."""

import argparse
import json
from typing import TYPE_CHECKING

from sagewan.cli.streams import say
from sagewan.errors import UnsupportedError
from sagewan.plan.hardware import GIB
from sagewan.plan.modes import AUTO, MODES
from sagewan.plan.request import unknown_choice

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sagewan.pipeline.doctor import Diagnosis, TriedBlock, TriedMode, TriedRow
    from sagewan.plan.blocks import BlockRow
    from sagewan.plan.catalogue import Implementation, Problem
    from sagewan.plan.evidence import SelfTest
    from sagewan.plan.hardware import Device, Hardware


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``sagewan doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--require",
        metavar="MODE",
        help=f"exit 3 unless this attention mode runs here by itself: {', '.join(MODES)}",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N"
    )


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, and answer ``--require`` with the exit code: 0 or 3."""
    if arguments.require is not None and arguments.require not in MODES:
        raise unknown_choice("require", arguments.require, MODES)
    diagnosis = _diagnose(arguments.device)
    if arguments.json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        _show(diagnosis)
    if arguments.require is None:
        return 0
    mode = diagnosis.mode(arguments.require)
    if mode.itself:
        return 0
    say(f"{mode.name} does not run here: {mode.why}")
    return UnsupportedError.exit_code


def _self_test(
    row: "Implementation | BlockRow", device: "Device", problem: "Problem"
) -> "SelfTest":
    from sagewan.attention.self_test import self_test
    from sagewan.plan.blocks import BlockRow

    if not isinstance(row, BlockRow):
        return self_test(row, device, problem)
    from sagewan.model.block_self_test import self_test_block

    return self_test_block(row, device, problem)


def _diagnose(device_name: str) -> "Diagnosis":
    from rich.console import Console

    from sagewan.pipeline.doctor import diagnose
    from sagewan.pipeline.probe import probe

    hardware = probe()
    chosen = hardware.device(device_name)
    with Console(stderr=True).status("looking at this machine") as status:

        def test_and_store(
            row: "Implementation | BlockRow", device: "Device", problem: "Problem"
        ) -> "SelfTest":
            from sagewan.attention.cache import store

            status.update(f"testing {row.name} on {device.name}")
            test = _self_test(row, device, problem)
            store(test, device, hardware, problem)
            return test

        return diagnose(hardware, chosen, test_and_store)


def _show(diagnosis: "Diagnosis") -> None:
    from rich.console import Console
    from rich.text import Text

    # Redirected output has no width of its own; rich takes 80 columns there.
    console = Console(highlight=False)
    _show_machine(console, diagnosis)
    for problem in diagnosis.problems:
        console.print(Text.assemble(("problem: ", "bold red"), problem))
    console.print()
    console.print(_mode_table(diagnosis))
    console.print()
    console.print(_row_table(diagnosis))
    console.print()
    console.print(_block_table(diagnosis))
    for sentence, names in _refusals(diagnosis).items():
        console.print(Text.assemble((", ".join(names), "bold"), f": {sentence}"))
    if diagnosis.advice:
        console.print(Text("\nTo get more:", style="bold"))
        for line in diagnosis.advice:
            console.print(Text(f"  {line}"))


def _refusals(diagnosis: "Diagnosis") -> dict[str, list[str]]:
    """Each objection with the implementations that have it."""
    refusals: dict[str, list[str]] = {}
    everything: list[TriedRow | TriedBlock] = [*diagnosis.rows, *diagnosis.blocks]
    for tried in everything:
        if tried.objection:
            refusals.setdefault(tried.objection.sentence(), []).append(tried.row.name)
    return refusals


def _show_machine(console: "Console", diagnosis: "Diagnosis") -> None:
    from rich.text import Text

    hardware = diagnosis.hardware
    lines = {
        "machine": f"{hardware.cpu.name}, {hardware.cores} cores, "
        f"{hardware.memory_total / GIB:.0f} GiB, {hardware.system}, Python {hardware.python}",
        **{
            f"GPU {device.index}": f"{device.name}, compute capability {device.sm / 10:.1f}, "
            f"{device.memory_free / GIB:.1f} of {device.memory_total / GIB:.1f} GiB free"
            for device in hardware.devices
        },
        "driver": hardware.driver or "no NVIDIA driver",
        "torch": _torch(hardware),
        "packages": ", ".join(
            f"{name} {version}" for name, version in hardware.packages.items() if name != "torch"
        ),
        "tested on": diagnosis.device.name,
    }
    for name, text in lines.items():
        console.print(Text.assemble((f"{name:<10}", "bold"), text))


def _torch(hardware: "Hardware") -> str:
    version = hardware.packages.get("torch")
    if version is None:
        return "not installed"
    return f"{version}, CUDA {hardware.torch_cuda}" if hardware.torch_cuda else f"{version}, CPU"


def _table(title: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _mode_table(diagnosis: "Diagnosis") -> "Table":
    table = _table("Attention modes")
    table.add_column("mode", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("by, or why not")
    for mode in diagnosis.modes:
        here, style = _here(mode)
        table.add_row(mode.name, f"[{style}]{here}[/]", _by_or_why(mode))
    return table


def _here(mode: "TriedMode") -> tuple[str, str]:
    if mode.name == AUTO:
        return f"is {mode.runs}", "green"
    return ("runs", "green") if mode.itself else (f"→ {mode.runs}", "yellow")


def _by_or_why(mode: "TriedMode") -> str:
    from rich.markup import escape

    return escape(mode.implementation if mode.why is None else mode.why)


def _row_table(diagnosis: "Diagnosis") -> "Table":
    table = _table("Implementations")
    table.add_column("name", no_wrap=True)
    table.add_column("Q·K / P·V", overflow="fold")
    for column in ("error", "limit", "ms", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for tried in diagnosis.rows:
        table.add_row(tried.row.name, f"{tried.row.qk} / {tried.row.pv}", *_numbers(tried))
    return table


def _block_table(diagnosis: "Diagnosis") -> "Table":
    table = _table("Transformer blocks")
    table.add_column("name", no_wrap=True)
    table.add_column("with attention by", overflow="fold")
    for column in ("error", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for tried in diagnosis.blocks:
        table.add_row(tried.row.name, tried.row.prepares or "all", *_error(tried))
    return table


def _error(tried: "TriedRow | TriedBlock") -> tuple[str, str]:
    """Error and limit as text; what failed is red."""
    if tried.objection and tried.error is None:
        asked = tried.objection.code.startswith(("self-test", "import", "function", "run-failed"))
        return ("[red]failed[/]" if asked else "[dim]no[/]", "")
    if tried.error is None:
        return ("[green]runs[/]", "")
    style = "red" if tried.objection else "green"
    return (f"[{style}]{tried.error:.2g}[/]", f"{tried.limit:.2g}")


def _numbers(tried: "TriedRow") -> tuple[str, ...]:
    """As :func:`_error`, with milliseconds and speed against torch."""
    return (
        *_error(tried),
        "" if tried.milliseconds is None else f"{tried.milliseconds:.3g}",
        "" if tried.speed is None else f"{tried.speed:.2f}×",
    )
