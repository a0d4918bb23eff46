"""A whole run of the demo model on a real GPU: the report's count against a profiler's trace."""

from pathlib import Path

import pytest

from tests.pipeline.traces import CALLS, make, trace_of_denoising

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["sdpa", "flash_attn", "sageattn", "sageattn_3", "auto"])
def test_the_report_counts_what_the_trace_shows(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, attention=mode)  # compiles, so that the trace holds the run alone
    ran, trace = trace_of_denoising(tmp_path, monkeypatch, attention=mode)
    assert sum(row["calls"] for row in ran) == CALLS
    by_torch = sum(row["calls"] for row in ran if row["implementation"] == "torch.sdpa")
    # Cross-attention is torch's in every mode; self-attention only where the report says so.
    assert trace.torch_attention == CALLS + by_torch, trace.operators
    if by_torch == 0:
        assert CALLS in trace.attention_kernels.values(), trace.attention_kernels


def test_a_seed_means_the_same_file_on_every_run(tmp_path: Path) -> None:
    hashes = {make(tmp_path, attention="sdpa").report["output"]["sha256"] for _ in range(2)}
    assert len(hashes) == 1


def test_emulation_runs_on_the_gpu_and_says_so(tmp_path: Path) -> None:
    result = make(tmp_path, attention="sageattn_3_fp4", emulate=True)
    assert [row["implementation"] for row in result.report["attention"]["ran"]] == [
        "emulated.sageattn_3_fp4_unpacked"
    ]
