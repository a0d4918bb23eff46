"""Draws reports of ``sagewan bench step``: step_chart.py FOLDER REPORT…

``step.svg``: how fast each is beside diffusers; ``roofline.svg``: what their products and their
attention reach of the card's rates; ``step-growth.svg``, of a report made with --growth.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from sagewan.pipeline.chart import bars
from sagewan.pipeline.plot import Series, plot

# Of the whole table, in the roofline.
SHOWN = (
    "diffusers",
    "diffusers, FA2",
    "diffusers, compiled",
    "ours bf16 + sdpa",
    "ours fp8_scaled + sageattn_3",
    "ours fp8_scaled + sageattn_3_fp8",
    "ours fp4_scaled + sageattn_3_fp8",
)


def speeds(reports: list[dict[str, Any]]) -> str:
    """One group of bars a report: times the speed of diffusers as it is; ours are marked."""
    names = list(dict.fromkeys(one["name"] for found in reports for one in found["results"]))
    series = {}
    for found in reports:
        speed = {one["name"]: one["over_eager"] for one in found["results"]}
        title = f"{found['model']}, {found['tokens']:,} tokens, times diffusers ({found['device']})"
        series[title] = [speed.get(name) for name in names]
    return bars(names, series, marked=[name for name in names if name.startswith("ours ")])


def roofline(found: dict[str, Any]) -> str:
    """TFLOPS of the stages against operations for each byte that must be moved; the roofs are the
    card's listed rates."""
    rate = found["peak_tflops"]
    least, most = 30.0, 30_000.0
    roofs = [
        Series(
            name=f"{bits} bit: {top:g} TFLOPS, {rate['bandwidth']:g} TB/s",
            points=(
                (least, least * rate["bandwidth"]),
                (top / rate["bandwidth"], top),
                (most, top),
            ),
            marks=False,
            dashed=bits == 8,
        )
        for bits, top in ((16, rate["bits16"]), (8, rate["fp8"]))
        if top
    ]
    drawn = []
    for one in found["results"]:
        if one["name"] in SHOWN and one["stages"]:
            bits = {"none": "16", "fp8_scaled": "8", "fp4_scaled": "4"}[one["weights"]]
            products = "products" if one["text_ms"] is None else "later_products"
            works = {
                "products": found["work"][products][bits],
                "attention": found["work"]["attention"],
            }
            reached = {
                stage: work["operations"] / spent / 1e9
                for stage, work in works.items()
                if (spent := one["stages"][stage])
            }
            points = tuple(
                (min(works[stage]["operations"] / works[stage]["bytes"], most), tflops)
                for stage, tflops in reached.items()
            )
            said = ", ".join(f"{tflops:.0f}" for tflops in reached.values())
            name = f"{one['name']}: {said}"
            drawn.append(Series(name=name, points=points, colour=len(drawn), line=False))
    title = f"Products (left) and attention (right), {found['tokens']:,} tokens, {found['device']}"
    return plot(title, [*roofs, *drawn], "operations a byte", "TFLOPS")


def growth(found: dict[str, Any]) -> str:
    """Seconds a step against tokens, and the model of each as a dashed line."""
    series = []
    for index, one in enumerate(found["growth"]):
        points = tuple((tokens, seconds) for tokens, seconds in one["points"])
        first, last = points[0][0], points[-1][0]
        between = [first * (last / first) ** (i / 40) for i in range(41)]
        model = tuple((n, one["linear"] * n + one["quadratic"] * n * n) for n in between)
        series += [
            Series(name=one["name"], points=points, colour=index, line=False),
            Series(
                name=f"linear and quadratic, within {math.ceil(100 * one['worst'])} %",
                points=model,
                colour=index,
                dashed=True,
                marks=False,
            ),
        ]
    return plot(f"A step of {found['model']} ({found['device']})", series, "tokens", "seconds")


def main(folder: Path, paths: list[Path]) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    tables = [found for found in reports if "results" in found]
    charts = {"step.svg": speeds(tables)} if tables else {}
    rated = [found for found in tables if found["peak_tflops"] and found["results"][0]["stages"]]
    charts |= {"roofline.svg": roofline(rated[-1])} if rated else {}
    grown = [found for found in reports if "growth" in found]
    charts |= {"step-growth.svg": growth(grown[-1])} if grown else {}
    for name, picture in charts.items():
        (folder / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
