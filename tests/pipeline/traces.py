"""What a profiler sees of a run of the demo model, to hold the report against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sagewan.pipeline import denoise as stage
from sagewan.pipeline import generate
from sagewan.pipeline.run import Result
from sagewan.plan.request import Request

STEPS = 2
LAYERS = 8
# Guidance makes two forward passes a step.
CALLS = STEPS * 2 * LAYERS


@dataclass(frozen=True)
class Trace:
    """Calls by name: torch's attention operators, and the GPU's kernels that are attention."""

    operators: dict[str, int]
    attention_kernels: dict[str, int]

    @property
    def torch_attention(self) -> int:
        """Calls of scaled_dot_product_attention, whichever backend each of them took."""
        return self.operators.get("aten::scaled_dot_product_attention", 0)


def make(folder: Path, **fields: Any) -> Result:
    """Two steps of the demo."""
    prompt, output = "a red ball rolls to the right", folder / "ball.mp4"
    wanted = {"seed": 1, "steps": STEPS, **fields}
    return generate(Request(prompt=prompt, output=output, **wanted))


def trace_of_denoising(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> tuple[list[dict[str, Any]], Trace]:
    """The report's ``attention.ran``, and a trace of the denoising alone: the text encoder and
    the autoencoder have attention of their own."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, acc_events=True)
    real = stage.denoise

    def traced(*arguments: Any, **options: Any) -> torch.Tensor:
        with profiler:
            return real(*arguments, **options)

    monkeypatch.setattr(stage, "denoise", traced)
    result = make(folder, **fields)
    on_gpu, on_cpu = {}, {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            on_gpu[event.key] = event.count
        elif "attention" in event.key:
            on_cpu[event.key] = event.count
    kernels = {name: n for name, n in on_gpu.items() if "att" in name.lower()}
    return result.report["attention"]["ran"], Trace(on_cpu, kernels)
