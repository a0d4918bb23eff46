"""A whole run of the demo model on a real GPU: the report's count against a profiler's trace."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sagewan.pipeline import generate
from sagewan.pipeline.run import Result
from sagewan.plan.request import Request

pytestmark = pytest.mark.gpu

STEPS = 2
LAYERS = 8
# Guidance makes two forward passes a step.
CALLS = STEPS * 2 * LAYERS


def make(folder: Path, **fields: object) -> Result:
    return generate(
        Request(
            prompt="a red ball rolls to the right",
            seed=1,
            steps=STEPS,
            output=folder / "ball.mp4",
            **fields,
        )
    )


def kernels(trace: profile) -> Counter[str]:
    """How often each CUDA kernel ran, by name."""
    return Counter(
        {
            event.key: event.count
            for event in trace.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
        }
    )


def torch_attention(counts: Counter[str]) -> int:
    """Calls of torch's own attention kernels; each of its backends has its own name."""
    marks = ("pytorch_flash", "cudnn_generated_fort_native_sdpa", "fmha_cutlass")
    return sum(n for name, n in counts.items() if any(mark in name for mark in marks))


@pytest.mark.parametrize("mode", ["sdpa", "flash_attn", "sageattn", "auto"])
def test_the_report_counts_what_the_trace_shows(mode: str, tmp_path: Path) -> None:
    make(tmp_path, attention=mode)  # compiles and self-tests outside the trace
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        result = make(tmp_path, attention=mode)
    ran = result.report["attention"]["ran"]
    assert sum(row["calls"] for row in ran) == CALLS
    counts = kernels(trace)
    # Cross-attention is torch's in every mode; self-attention only where the report says so.
    by_torch = sum(row["calls"] for row in ran if row["implementation"] == "torch.sdpa")
    assert torch_attention(counts) == CALLS + by_torch, counts.most_common(40)
    if by_torch == 0:
        assert any(n == CALLS for name, n in counts.items() if "att" in name.lower()), counts


def test_a_seed_means_the_same_file_on_every_run(tmp_path: Path) -> None:
    hashes = {make(tmp_path, attention="sdpa").report["output"]["sha256"] for _ in range(2)}
    assert len(hashes) == 1


def test_emulation_runs_on_the_gpu_and_says_so(tmp_path: Path) -> None:
    result = make(tmp_path, attention="sageattn_3_fp4", emulate=True)
    assert [row["implementation"] for row in result.report["attention"]["ran"]] == [
        "emulated.sageattn_3_fp4"
    ]
