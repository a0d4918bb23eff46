"""Sparse attention in whole runs: what is left out, what is told, and that order is nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.model import tiles
from sagewan.pipeline import generate
from sagewan.pipeline.export import read_settings
from sagewan.plan.request import Request
from sagewan.plan.serialize import settings_from_json
from sagewan.plan.sparsity import Sparsity, SparsityPlan
from tests.pipeline.runs import difference, latents_of, picture, plan_for

Folder = Callable[[str], Path]
# 5 × 16 × 16 tokens: ten blocks.
LARGE = {"size": (256, 256), "frames": 17}
HALF = Sparsity.parse("radial:0.5,1")


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
def test_the_order_of_the_tokens_changes_nothing(
    name: str, shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every block kept, a run in the new order is the run in the old one."""

    def all_blocks(plan: SparsityPlan, _: object) -> torch.Tensor:
        return torch.ones(1, 1, plan.blocks, plan.blocks, dtype=torch.bool)

    monkeypatch.setattr(tiles, "nearest_blocks", all_blocks)
    given: dict[str, Any] = {} if "t2v-1" in name else {"image": picture(tmp_path / "a.png", 1)}
    size = {"size": (512, 512), "frames": 9} if "ti2v" in name else LARGE
    plan = plan_for(shrunken_folder(name), sparsity=HALF, steps=2, **size, **given)
    launcher = Launcher()
    sparse = latents_of(plan, launcher)
    assert launcher.masked_calls > 0
    plain = plan_for(shrunken_folder(name), steps=2, **size, **given)
    assert difference(sparse, latents_of(plain)) < 1e-5


def test_what_is_left_out_is_left_out_in_later_steps_and_layers_alone(
    shrunken_folder: Folder,
) -> None:
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    plan = plan_for(folder, sparsity=HALF, steps=3, **LARGE)
    launcher = Launcher()
    latents = latents_of(plan, launcher)
    (ran,) = launcher.ran()
    assert ran["implementation"] == "sagewan.sdpa_blocks"
    # Two layers, two passes, three steps; one step is dense, and one layer.
    assert (launcher.calls, launcher.masked_calls) == (12, 4)
    assert 0 < difference(latents, latents_of(plan_for(folder, steps=3, **LARGE))) < 0.5


def test_groups_of_heads_and_chunks_see_the_same(shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder("wan2.1-t2v-1.3b"), sparsity=HALF, steps=2, **LARGE)
    small = replace(plan.memory.chunks, tokens=300, heads=1)
    chunked = replace(plan, memory=replace(plan.memory, chunks=small))
    assert difference(latents_of(chunked), latents_of(plan)) < 1e-5


def test_a_video_says_what_was_left_out_and_holds_what_makes_it_again(tmp_path: Path) -> None:
    request = Request(
        prompt="a red ball",
        output=tmp_path / "a.mp4",
        attention="sdpa",
        sparsity=Sparsity.parse("sta:0.5"),
        size=(256, 128),
        steps=4,
        seed=2,
    )
    first = generate(request)
    facts = first.report["attention"]["sparsity"]
    assert facts["requested"] == "sta:0.5"
    assert (facts["blocks"], facts["kept"]) == (2, 1)
    # A quarter of the steps and one of eight layers are dense.
    assert facts["calls"] == 3 * 2 * 7
    assert facts["skipped"] == pytest.approx(1 / 2 * 3 / 4 * 7 / 8)
    assert settings_from_json(read_settings(request.output))["sparsity"] == request.sparsity
