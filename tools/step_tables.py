"""Writes the tables of ``sagewan bench step`` into the documentation:
python -m tools.step_tables REPORT REPORT REPORT.

The reports are those of 480p and of 720p, and one made with --growth. Each table stands between
``<!-- step NAME -->`` and ``<!-- end -->``, and nothing else is touched.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.step_chart import SHOWN

ROOT = Path(__file__).parents[1]
Report = dict[str, Any]
# Of the README: what a contestant is called there in both languages, and how many GB the weights of
# the whole model are, by `sagewan plan`.
README = {
    "diffusers": ("diffusers", "diffusers", 28.7),
    "diffusers, compiled": ("diffusers, compiled", "diffusers，已编译", 28.7),
    "ours bf16 + sdpa": ("BF16: `none`, `sdpa`", "BF16：`none`、`sdpa`", 28.7),
    "ours fp8_scaled + sageattn_3_fp8": (
        "FP8: `fp8_scaled`, `sageattn_3_fp8`",
        "FP8：`fp8_scaled`、`sageattn_3_fp8`",
        14.6,
    ),
    "ours fp4_scaled + sageattn_3_fp8": (
        "FP4: `fp4_scaled`, `sageattn_3_fp8`",
        "FP4：`fp4_scaled`、`sageattn_3_fp8`",
        8.5,
    ),
}
# In bold.
ADVISED = "ours fp8_scaled + sageattn_3_fp8"
# What diffusers, FA2 shows nothing more by, and what differs in the stage of attention alone.
STAGED = tuple(
    name for name in SHOWN if name not in ("diffusers, FA2", "ours fp8_scaled + sageattn_3")
)


def _fraction(value: float, places: int) -> str:
    """``.053`` for 0.053."""
    return f"{value:.{places}f}".lstrip("0")


def _three(value: float) -> str:
    """Three digits: 6.67 and 24.9."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _by_name(found: Report) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in found["results"]}


def speeds(reports: Sequence[Report]) -> Iterator[str]:
    """Every contestant at each size."""
    heads = ("ms a layer", "× diffusers", "× compiled", "s a step", "extra GiB")
    cells = [f"{size}: {heads[0]} | {' | '.join(heads[1:])}" for size in ("480p", "720p")]
    yield f"| | {' | '.join(cells)} | error |"
    yield "|---" * (2 + 5 * len(reports)) + "|"
    for name, first in _by_name(reports[0]).items():
        row = []
        for found in reports:
            one = _by_name(found)[name]
            row += [
                f"{one['layer_ms']:.1f}",
                f"{one['over_eager']:.2f}",
                f"{one['over_compiled']:.2f}",
                f"{one['step_seconds']:.2f}",
                f"{one['extra_bytes'] / 2**30:.2f}",
            ]
        error = _fraction(first["error"], 4) if first["error"] else "–"
        yield f"| {name} | {' | '.join(row)} | {error} |"


def stages(reports: Sequence[Report]) -> Iterator[str]:
    """Milliseconds of a layer's stages and their share, and the share of the floor."""
    names = list(reports[0]["results"][0]["stages"])
    yield f"| | | {' | '.join(names)} | % of the floor |"
    yield "|---" * (3 + len(names)) + "|"
    for size, found in zip(("480p", "720p"), reports, strict=True):
        for name in STAGED:
            one = _by_name(found)[name]
            whole = sum(one["stages"].values())
            row = [f"{spent:.1f}, {100 * spent / whole:.0f} %" for spent in one["stages"].values()]
            yield f"| {size} | {name} | {' | '.join(row)} | {100 * one['of_floor']:.0f} |"


def growth(found: Report) -> Iterator[str]:
    """Seconds a step at each number of tokens."""
    tokens = [count for count, _ in found["growth"][0]["points"]]
    yield f"| tokens | {' | '.join(f'{count:,}' for count in tokens)} |"
    yield "|---" * (1 + len(tokens)) + "|"
    for one in found["growth"]:
        yield f"| {one['name']} | {' | '.join(_growing(seconds) for _, seconds in one['points'])} |"


def _growing(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 100 else f"{seconds:.2f}".lstrip("0")


def readme(reports: Sequence[Report], language: int) -> Iterator[str]:
    """What a user may choose between, in English (0) or in Chinese (1)."""
    weights, beyond, error = (
        ("weights", "beyond the weights", "error"),
        ("权重", "权重之外", "误差"),
    )[language]
    second, comma = (("s", ", "), ("秒", "、"))[language]
    yield f"| | {weights} | 832×480 | | 1280×720 | | {beyond} | {error} |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, (*called, stored) in README.items():
        ones = [_by_name(found)[name] for found in reports]
        bold = "**" if name == ADVISED else ""
        title = f"{bold}{called[language]}{bold}"
        timed = [
            f"{bold}{value}{bold}"
            for one in ones
            for value in (f"{_three(one['step_seconds'])} {second}", f"{one['over_eager']:.2f}×")
        ]
        extra = comma.join(f"{one['extra_bytes'] / 2**30:.1f}" for one in ones)
        off = _fraction(ones[0]["error"], 3) if ones[0]["error"] else ""
        yield f"| {title} | {stored:.1f} GB | {' | '.join(timed)} | {extra} GiB | {off} |".replace(
            "|  |", "| |"
        )


def tables(reports: Sequence[Report]) -> dict[str, Callable[[], Iterator[str]]]:
    """By the name between whose marks each stands."""
    sizes = reports[:2]
    return {
        "speeds": lambda: speeds(sizes),
        "stages": lambda: stages(sizes),
        "growth": lambda: growth(reports[2]),
        "readme": lambda: readme(sizes, 0),
        "readme-zh": lambda: readme(sizes, 1),
    }


def renewed(text: str, reports: Sequence[Report]) -> str:
    """A document with its tables made anew."""
    for name, lines in tables(reports).items():
        start, end = f"<!-- step {name} -->\n", "<!-- end -->"
        before, mark, rest = text.partition(start)
        if mark:
            text = before + start + "\n".join(lines()) + "\n" + end + rest.partition(end)[2]
    return text


def main(paths: Sequence[Path]) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for name in ("docs/measured.md", "README.md", "README.zh-CN.md"):
        document = ROOT / name
        text = document.read_text(encoding="utf-8")
        document.write_text(renewed(text, reports), encoding="utf-8")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
