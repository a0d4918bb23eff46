"""``sagewan bench attention``: ours and others' on the same inputs, checked and then timed."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from sagewan.cli.bench import about, add_common_arguments, chosen_of
from sagewan.cli.streams import say
from sagewan.errors import RequestError
from sagewan.plan.modes import MODES

if TYPE_CHECKING:
    from sagewan.attention.bench import Measured

_WRONG = 4
_COLUMNS = (
    *("", "family", "shape", "error", "ms", "TFLOPS", "× torch", "% of peak", "extra MiB"),
    "× dense",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``sagewan bench attention``."""
    parser.add_argument(
        "--modes",
        default=",".join(MODES),
        metavar="MODE,…",
        help="the modes to measure, beside torch's default; all if left out",
    )
    parser.add_argument(
        "--shapes",
        metavar="BxHxN,…",
        help="batch, heads and tokens, such as 1x40x32760; Wan's if left out",
    )
    parser.add_argument("--families", default="bias,local", metavar="NAME,…", help="bias, local")
    parser.add_argument(
        "--sparsity",
        nargs="+",
        default=[],
        metavar="SHARE",
        help="such shares of the blocks of keys left out too, such as 0.5 0.75 0.9",
    )
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 4 where one of our own was not right."""
    modes = chosen_of(arguments.modes, "modes", tuple(MODES))
    families = chosen_of(arguments.families, "families", ("bias", "local"))
    shapes = _shapes(arguments.shapes)
    sparsities = tuple(map(_share, arguments.sparsity))
    from sagewan.attention import bench
    from sagewan.pipeline.files import check_file, written_whole
    from sagewan.pipeline.probe import probe

    if arguments.json:
        check_file("json", arguments.json)
    hardware = probe()
    device = hardware.device(arguments.device)
    if shapes is None:
        shapes = bench.SHAPES if device.is_cuda else bench.SHAPES_ON_CPU
    chosen, refused = bench.contestants(device, hardware, modes, emulate=arguments.emulate)
    for name, why in refused.items():
        say(f"{name} is left out: {why}")
    print(_line(_COLUMNS))
    found = []
    for shape in shapes:
        for family in families:
            for one in bench.measure(chosen, family, shape, device, sparsities):
                found.append(one)
                print(_line(_cells(one)), flush=True)
    if arguments.json:
        report = {**about(device, hardware), "left_out": refused, "results": [*map(asdict, found)]}
        with written_whole(arguments.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    ours = [one for one in found if one.wrong and one.name.startswith("sagewan.")]
    return _WRONG if ours else 0


def _shapes(text: str | None) -> tuple[tuple[int, int, int], ...] | None:
    """``1x40x32760,2x24x8192`` → numbers; None if the flag was left out."""
    if text is None:
        return None
    parts = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    numbers = [(int(x[1]), int(x[2]), int(x[3])) for x in parts if x]
    if len(numbers) < len(parts) or not all(all(x) for x in numbers):
        raise RequestError(f"shapes={text}: write BATCHxHEADSxTOKENS, such as 1x40x32760")
    return tuple(numbers)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise RequestError(f"sparsity={text}: write a share between 0 and 1, such as 0.75")
    return share


def _cells(one: "Measured") -> tuple[str, ...]:
    def shown(value: float | None, text: Callable[[float], str]) -> str:
        return "–" if value is None else text(value)

    cells = (
        f"{one.name} −{one.sparsity:.0%}" if one.sparsity else one.name,
        one.family,
        "x".join(map(str, one.shape)),
        shown(one.error, lambda x: f"{x:.5f}"),
        shown(one.milliseconds, lambda x: f"{x:.2f}"),
        shown(one.tflops, lambda x: f"{x:.0f}"),
        shown(one.ratio, lambda x: f"{x:.2f}"),
        shown(one.of_peak, lambda x: f"{100 * x:.0f}"),
        shown(one.extra_bytes, lambda x: f"{x / 2**20:.0f}"),
        "" if one.of_dense is None else f"{one.of_dense:.2f}",
    )
    return (*cells[:3], f"not timed: {one.wrong}") if one.wrong else cells


def _line(cells: Sequence[str]) -> str:
    widths = (36, 7, 14, 9, 9, 7, 8, 10, 10, 8)
    first, *others = (
        text.ljust(width) if place == 0 else text.rjust(width)
        for place, (text, width) in enumerate(zip(cells, widths, strict=False))
    )
    return "".join((first, *others)).rstrip()
