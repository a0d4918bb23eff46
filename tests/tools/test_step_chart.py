"""The charts of ``sagewan bench step``."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tools import step_chart

SVG = "{http://www.w3.org/2000/svg}"


def _result(name: str, weights: str, speed: float | None) -> dict[str, Any]:
    text_ms = 0.3 if name.startswith("ours") else None
    stages = {"attention": 20.0, "preparation": 2.0, "products": 15.0, "everything else": 3.0}
    return {
        "name": name,
        "weights": weights,
        "over_eager": speed,
        "stages": stages,
        "text_ms": text_ms,
    }


REPORT = {
    "device": "NVIDIA H100 80GB HBM3",
    "model": "wan2.1-t2v-14b",
    "tokens": 32760,
    "peak_tflops": {"bits16": 989, "fp8": 1979, "fp4": 0, "int8": 1979, "bandwidth": 3.35},
    "work": {
        "products": {bits: {"operations": 2e13, "bytes": 4e9} for bits in ("16", "8", "4")},
        "later_products": {bits: {"operations": 1.8e13, "bytes": 4e9} for bits in ("16", "8", "4")},
        "attention": {"operations": 2.2e13, "bytes": 1.4e9},
    },
    "results": [
        _result("diffusers", "none", 1.0),
        _result("ours bf16 + sdpa", "none", 1.1),
        _result("ours fp8_scaled + sageattn_3_fp8", "fp8_scaled", 2.0),
    ],
}
GROWN = {
    "device": "NVIDIA H100 80GB HBM3",
    "model": "wan2.1-t2v-14b",
    "growth": [
        {
            "name": "diffusers",
            "points": [[8000, 0.9], [32000, 7.0], [250000, 310.0]],
            "linear": 1e-5,
            "quadratic": 5e-9,
            "worst": 0.04,
        }
    ],
}


def test_each_report_has_its_charts(tmp_path: Path) -> None:
    paths = []
    for name, report in (("a", REPORT), ("b", GROWN)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report), encoding="utf-8")
        paths.append(path)
    step_chart.main(tmp_path, paths)
    found = {path.name: ET.parse(path).getroot() for path in tmp_path.glob("*.svg")}
    assert set(found) == {"step.svg", "roofline.svg", "step-growth.svg"}
    # Three contestants with two stages each, and a dot for each in the legend.
    assert len(list(found["roofline.svg"].iter(f"{SVG}circle"))) == 3 * 2 + 3
    assert "".join(found["step-growth.svg"].itertext()).count("within 4 %") == 1


def test_points_lie_below_the_roof_and_in_the_picture(tmp_path: Path) -> None:
    root = ET.fromstring(step_chart.roofline(REPORT))
    for circle in root.iter(f"{SVG}circle"):
        title = circle.find(f"{SVG}title")
        if title is not None and title.text:
            intensity, reached = map(float, title.text.rpartition(": ")[2].split(", "))
            assert reached < min(1979, 3.35 * intensity)
        assert 0 < float(circle.get("cx", 0)) < 720


def test_without_a_listed_card_there_is_no_roofline(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(REPORT | {"peak_tflops": None}), encoding="utf-8")
    step_chart.main(tmp_path, [path])
    assert not (tmp_path / "roofline.svg").exists()


@pytest.mark.parametrize("worst", [0.001, 0.5])
def test_how_far_the_model_is_gets_rounded_up(worst: float) -> None:
    grown = GROWN | {"growth": [{**GROWN["growth"][0], "worst": worst}]}  # type: ignore[dict-item,index]
    assert f"within {1 if worst < 0.01 else 50} %" in step_chart.growth(grown)
