"""``sagewan bench step`` on a real GPU, of a small model."""

import json
from pathlib import Path

import pytest

from sagewan.bench.stages import ATTENTION, PRODUCTS
from sagewan.cli import main

pytestmark = pytest.mark.gpu


def test_every_contestant_is_right_and_its_time_is_told_by_stage(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    words = ("--model", "tiny", "--size", "256x256", "--frames", "17", "--rounds", "2")
    code = main(["bench", "step", *words, "--rivals", "eager,fa2", "--json", str(path)])
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {one["name"]: one["wrong"] for one in report["results"] if one["wrong"]} == {}
    assert code == 0
    for one in report["results"]:
        assert one["extra_bytes"] > 0
        assert one["stages"][ATTENTION] > 0
        assert one["stages"][PRODUCTS] > 0
