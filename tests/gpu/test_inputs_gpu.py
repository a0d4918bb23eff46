"""Inputs of layers, measured on a GPU, where blocks are fused and products may take FP8 alone."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from sagewan.checkpoint.calibration import by_layer
from sagewan.checkpoint.find import demo_folder, find_model
from sagewan.pipeline.inputs import measure_inputs
from sagewan.pipeline.progress import Watch
from sagewan.plan.request import Request

pytestmark = pytest.mark.gpu

LAYER, INPUTS = "blocks.3.ffn.net.2", 896


def measured(model: Path, device: str, quantization: str) -> torch.Tensor:
    request = Request(
        prompt="a red ball grows",
        model=str(model),
        device=device,
        quantization=quantization,
        size=(128, 128),
        frames=5,
        steps=4,
    )
    found = measure_inputs(request, None, Watch())
    assert found.layers == 36
    directions = by_layer(found.paths[0])(LAYER, INPUTS)
    assert directions is not None
    return directions.float()


def test_they_are_those_measured_on_a_cpu(tmp_path: Path) -> None:
    model = shutil.copytree(
        demo_folder(), tmp_path / "demo", ignore=lambda *_: {"inputs"}, copy_function=os.symlink
    )
    assert not find_model(str(model)).measured
    there = measured(model, "cpu", "none")
    for quantization in ("none", "fp8_scaled"):
        here = measured(model, "cuda", quantization)
        # Other steps of rounding: nearly the same tokens, so nearly the same moments.
        moments, others = here.T @ here, there.T @ there
        assert float((moments - others).norm() / others.norm()) < 0.1, quantization
