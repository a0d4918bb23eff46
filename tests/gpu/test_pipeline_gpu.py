"""Shrunken models on a real GPU: the same video as on the CPU, and memory given back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import encode
from sagewan.pipeline.decode import decode
from sagewan.pipeline.denoise import denoise
from sagewan.pipeline.guard import FrameGuard
from sagewan.pipeline.progress import Watch
from sagewan.plan.decoding import EXACT
from sagewan.plan.plan import Plan
from sagewan.plan.request import SCHEDULERS
from tests.pipeline.runs import difference, latents_of, picture, pictures_of, plan_for

pytestmark = pytest.mark.gpu

Folder = Callable[[str], Path]


def gpu_plan(folder: Path, **changes: Any) -> Plan:
    from sagewan.pipeline.probe import probe

    return plan_for(folder, probe(), **{"device": "cuda", "dtype": "float32", **changes})


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"])
def test_a_seed_gives_the_same_latents_as_on_the_cpu(
    name: str, shrunken_folder: Folder, tmp_path: Path
) -> None:
    changes = {"image": picture(tmp_path / "a.png", 1)}
    there = latents_of(gpu_plan(shrunken_folder(name), **changes))
    assert there.is_cuda
    assert difference(there.cpu(), latents_of(plan_for(shrunken_folder(name), **changes))) < 1e-2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_seed_is_the_same_bit_for_bit_in_16_bit(scheduler: str, shrunken_folder: Folder) -> None:
    folder = shrunken_folder("wan2.2-t2v-a14b")
    plan = gpu_plan(folder, dtype="bfloat16", scheduler=scheduler)
    once = latents_of(plan)
    assert once.dtype == torch.float32
    assert torch.equal(latents_of(plan), once)
    exact = latents_of(plan_for(folder, scheduler=scheduler))
    assert difference(once.cpu(), exact) < 0.2


def test_each_part_gives_its_memory_back(shrunken_folder: Folder, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 1)
    plan = gpu_plan(shrunken_folder("wan2.2-i2v-a14b"), image=path, dtype="bfloat16")
    # What torch itself keeps, such as the workspaces of cuBLAS, is there after a first run.
    list(decode(build(plan, Launcher()), plan, latents_of(plan), FrameGuard()))
    before = torch.cuda.memory_allocated()
    components = build(plan, Launcher())
    conditions = encode(components, plan, pictures_of(plan))
    held = sum(tensor.nbytes for tensor in vars(conditions).values() if tensor is not None)
    slack = 2**20
    assert torch.cuda.memory_allocated() - before <= held + slack
    latents = denoise(components, plan, conditions, Watch())
    assert torch.cuda.memory_allocated() - before <= held + latents.nbytes + slack
    frames = list(decode(components, plan, latents, FrameGuard()))
    assert len(frames) == plan.frames
    assert torch.cuda.memory_allocated() - before <= held + latents.nbytes + slack


def test_frames_in_bfloat16_are_those_of_float32_rounded_and_always_the_same() -> None:
    changes = {"prompt": "a red ball rolls to the right", "negative": None, "steps": 8}
    changes |= {"size": None, "frames": None, "dtype": "bfloat16"}
    plan = gpu_plan(Path("demo"), **changes)
    assert (plan.decoding.dtype, plan.decoding.channels_last) == ("bfloat16", True)
    latents = latents_of(plan)

    def frames(plan: Plan) -> np.ndarray:
        return np.stack(list(decode(build(plan, Launcher()), plan, latents, FrameGuard())))

    found = frames(plan)
    assert np.array_equal(frames(plan), found)
    exact = frames(replace(plan, decoding=EXACT))
    apart = np.square(found.astype(float) - exact).mean()
    assert 0 < apart < 255**2 / 10**4.5, "45 dB"
