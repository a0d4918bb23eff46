"""The documentation's tables of a whole step are those of the reports that are kept."""

import copy
import json
from typing import Any

import pytest

from tools.step_tables import ROOT, renewed

DOCUMENTS = ("docs/measured.md", "README.md", "README.zh-CN.md")


def reports() -> list[dict[str, Any]]:
    results = ROOT / "benchmarks" / "results"
    last = [
        sorted(results.glob(f"step-{kind}-h100-*.json"))[-1] for kind in ("480p", "720p", "growth")
    ]
    return [json.loads(path.read_text(encoding="utf-8")) for path in last]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_written_is_what_was_measured(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- step " in text
    assert renewed(text, reports()) == text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_another_measurement_changes_the_tables_and_nothing_else(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    other = copy.deepcopy(reports())
    for found in other[:2]:
        for one in found["results"]:
            one["step_seconds"] *= 2
    for one in other[2]["growth"]:
        one["points"] = [[tokens, 2 * seconds] for tokens, seconds in one["points"]]
    changed = renewed(text, other)
    assert changed != text
    lines = zip(text.splitlines(), changed.splitlines(), strict=True)
    assert all(a == b or a.startswith("| ") for a, b in lines)
    assert renewed(changed, reports()) == text
