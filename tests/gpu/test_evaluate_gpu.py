"""An evaluation on a real GPU: our kernels serve it, in batches, and cost what formats cost."""

from pathlib import Path

import pytest

from sagewan.evaluate.run import Evaluated, Evaluation, evaluate
from sagewan.plan.request import Request

pytestmark = pytest.mark.gpu

MODES = ("sageattn", "sageattn_3", "sageattn_3_fp8", "sageattn_3_fp4")


def evaluated(folder: Path, *modes: str, batch: int | None = None) -> Evaluated:
    evaluation = Evaluation(
        request=Request(prompt="x", seed=0, steps=8, emulate=True),
        attention=modes,
        quantization=("none", "fp8_scaled"),
        folder=folder,
        count=24,
        batch=batch,
    )
    return evaluate(evaluation)


def test_every_mode_has_its_row_and_its_cost(tmp_path: Path) -> None:
    found = {entry["name"]: entry for entry in evaluated(tmp_path, *MODES).entries}
    for mode in MODES[:3]:
        if found[mode]["same_as"] is None and not found[mode]["fallbacks"]:
            assert all(told.startswith(f"{mode} (sagewan.") for told in found[mode]["ran"])
    errors = {name: entry["dit"]["value"] for name, entry in found.items() if entry.get("dit")}
    assert errors["sageattn_3"] < errors["sageattn_3_fp4"] < 0.3
    assert all(error > 0 for error in errors.values())
    assert errors["sageattn_3, fp8_scaled"] > errors["sageattn_3"]
    assert all(entry.get("finite", 24) == 24 for entry in found.values())


def test_a_batch_scores_as_its_clips_do(tmp_path: Path) -> None:
    together = evaluated(tmp_path / "a", "sageattn_3").entries[1]
    alone = evaluated(tmp_path / "b", "sageattn_3", batch=5).entries[1]
    assert together["dit"]["value"] == pytest.approx(alone["dit"]["value"], rel=0.1)
    assert abs(together["right"]["count"] - alone["right"]["count"]) <= 2
