"""A model's inputs are measured once; its weights are rounded by them from then on, and told so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.checkpoint.calibration import by_layer, place_of
from sagewan.checkpoint.find import find_model
from sagewan.errors import RequestError
from sagewan.pipeline import generate, inputs
from sagewan.pipeline.inputs import measure_inputs, principal
from sagewan.pipeline.progress import Watch
from sagewan.plan.request import Request

SMALL: dict[str, Any] = {"size": (64, 64), "frames": 5, "steps": 2}


def test_principal_directions_are_those_of_the_inputs() -> None:
    rows = torch.randn(300, 40) * torch.linspace(3, 0.1, 40) + torch.linspace(-2, 2, 40)
    found = principal(rows.bfloat16(), 5)
    moments = rows.bfloat16().float().T @ rows.bfloat16().float() / 300
    moments /= moments.diagonal().mean()
    sizes, ways = torch.linalg.eigh(moments)
    assert torch.allclose(found.square().sum(1), sizes.flip(0)[:5], rtol=1e-3)
    best = (ways[:, -5:] * sizes[-5:]) @ ways[:, -5:].T
    assert torch.allclose(found.T @ found, best, atol=1e-3 * float(best.abs().max()))
    assert principal(torch.zeros(4, 16)).isfinite().all()
    assert principal(torch.randn(2, 16)).shape == (2, 16)


def test_it_is_measured_kept_used_and_told(shrunken_folder: Callable[[str], Path]) -> None:
    folder = shrunken_folder("wan2.2-t2v-a14b")
    request = Request(
        prompt="a cat", model=str(folder), attention="sdpa", shift=5.0, cfg=2.0, cfg_2=2.0, **SMALL
    )
    before = find_model(str(folder))
    assert not before.measured
    found = measure_inputs(request, None, Watch())
    # Each of two experts in a file of its own.
    assert found.paths == tuple(place_of(before.parts[p]) for p in ("transformer", "transformer_2"))
    assert found.layers == 2 * 6 * before.layers
    assert 0 < found.least <= 1.001
    width = before.heads * before.head_dim
    assert by_layer(found.paths[1])("blocks.1.attn1.to_k", width) is not None
    after = find_model(str(folder))
    assert dict(after.measured) == dict(zip(before.parts, found.paths, strict=False))


def test_a_run_rounds_by_them_and_reports_it(tmp_path: Path) -> None:
    request = Request(
        prompt="a red ball grows", output=tmp_path / "a.mp4", seed=1, quantization="fp8_scaled",
        **SMALL,
    )  # fmt: skip
    report = generate(request).report
    told = report["weights"]["measured"]
    assert told == {"transformer": str(find_model("demo").measured["transformer"])}
    assert report["plan"]["weights"]["measured"] == told
    plain = generate(replace(request, quantization="none")).report
    assert plain["weights"]["measured"] == {}


def test_what_can_t_be_measured_is_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball grows\na purple elephant sings\n", encoding="utf-8")
    request = Request(prompt="a red ball", **SMALL)
    with pytest.raises(RequestError, match=r"prompts, number 2"):
        measure_inputs(request, prompts, Watch())


def test_of_many_videos_no_more_is_kept_than_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball grows\n" * 10, encoding="utf-8")
    kept: list[int] = []

    def seen(rows: torch.Tensor) -> torch.Tensor:
        kept.append(len(rows))
        return principal(rows)

    monkeypatch.setattr(inputs, "ROWS", 24)
    monkeypatch.setattr(inputs, "principal", seen)
    # Forty passes.
    measure_inputs(Request(prompt="a red ball", **SMALL), prompts, Watch())
    assert 20 < sum(kept) / len(kept) < 28
