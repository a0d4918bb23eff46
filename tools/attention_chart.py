"""Draws the speeds in a report of ``sagewan bench attention``: attention_chart.py REPORT SVG."""

import json
import sys
from pathlib import Path

from sagewan.pipeline.chart import bars


def main(report: Path, picture: Path) -> None:
    """One group of bars for each shape, of the family ``bias``: times torch's default speed; ours
    are marked."""
    found = json.loads(report.read_text(encoding="utf-8"))
    results = [one for one in found["results"] if one["family"] == "bias"]
    names = list(dict.fromkeys(one["name"] for one in results))
    shapes = list(dict.fromkeys(tuple(one["shape"]) for one in results))
    speed = {(one["name"], tuple(one["shape"])): one["ratio"] for one in results}
    series = {
        f"{tokens:,} tokens, {heads} heads, times torch's default ({found['device']})": [
            speed.get((name, (batch, heads, tokens))) for name in names
        ]
        for batch, heads, tokens in shapes
    }
    ours = [name for name in names if name.startswith("sagewan.")]
    picture.write_text(bars(names, series, marked=ours), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
