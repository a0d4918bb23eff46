"""The report's count of calls against a profiler's trace, and against a planted substitute."""

from pathlib import Path

import pytest
import torch

from sagewan.plan.step_cache import StepCache
from tests.pipeline.traces import CALLS, LAYERS, make, trace_of_denoising


def test_with_sdpa_the_trace_holds_self_and_cross_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, trace = trace_of_denoising(tmp_path, monkeypatch, attention="sdpa")
    assert [(row["implementation"], row["calls"]) for row in ran] == [("torch.sdpa", CALLS)]
    assert trace.torch_attention == 2 * CALLS, trace.operators


def test_with_another_mode_the_trace_holds_cross_attention_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, trace = trace_of_denoising(tmp_path, monkeypatch, attention="sageattn", emulate=True)
    assert [(row["implementation"], row["calls"]) for row in ran] == [("emulated.sageattn", CALLS)]
    assert trace.torch_attention == CALLS, trace.operators


def test_what_a_step_cache_reuses_is_not_in_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"size": (64, 64), "frames": 5, "steps": 6}
    ran, trace = trace_of_denoising(
        tmp_path, monkeypatch, attention="sdpa", cache=StepCache.parse("easy:1"), **small
    )
    computed = sum(row["calls"] for row in ran)
    assert 2 * (2 + 1) * LAYERS <= computed < 2 * 6 * LAYERS
    assert trace.torch_attention == 2 * computed, trace.operators


def test_a_planted_substitute_shows_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def substitute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("sagewan.reference.emulation.sageattn", substitute)
    ran = make(tmp_path, attention="sageattn", emulate=True).report["attention"]["ran"]
    assert [row["implementation"] for row in ran] != ["emulated.sageattn"]
    assert "substitute" in ran[0]["implementation"]
