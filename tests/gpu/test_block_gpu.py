"""Fused blocks on a GPU: the path that ran, as near to float32 as the plain one in every cell."""

import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import find_model
from sagewan.kernels import fp8_linear, token_rows
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.model.block_self_test import self_test_block
from sagewan.pipeline import generate
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import encode
from sagewan.pipeline.decide import decide
from sagewan.pipeline.denoise import denoise, start
from sagewan.pipeline.probe import probe
from sagewan.pipeline.progress import Watch
from sagewan.plan.blocks import BlockPlan, block_rows
from sagewan.plan.catalogue import Problem
from sagewan.plan.plan import Plan
from sagewan.plan.request import Request
from tests.pipeline.runs import difference

pytestmark = pytest.mark.gpu
HOPPER, FUSED, PLAIN = block_rows()
MODES = ["sdpa", "sageattn", "sageattn_3", "sageattn_3_fp8"]
# Of one step. After more, or of the mean of a few, errors tell chance: a last bit may decide what a
# picture shows, and then it is far from the exact one.
SEEDS = tuple(range(1, 9))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_row_that_runs_here_passes_its_self_test(dtype: str, head_dim: int) -> None:
    hardware, problem = probe(), Problem(head_dim=head_dim, dtype=dtype)
    device = hardware.device("cuda")
    for row in block_rows():
        if head_dim not in (row.head_dims or (head_dim,)) or any(
            row.needs(dtype, device, hardware)
        ):
            continue
        test = self_test_block(row, device, problem)
        assert test.passed, test


def planned(**fields: Any) -> Plan:
    request = Request(prompt="a red ball rolls to the right", steps=1, seed=1, **fields)
    return decide(request, find_model("demo"), probe()).plan


@cache
def exact_latents(cfg: float) -> torch.Tensor:
    plan = planned(attention="sdpa", quantization="none", cfg=cfg, dtype="float32")
    return latents(plan)[0]


def latents(plan: Plan) -> tuple[torch.Tensor, list[dict[str, object]]]:
    components = build(plan, Launcher())
    conditions, noise = encode(components, plan, {}), start(plan, SEEDS)
    found = denoise(components, plan, conditions, Watch(), resume=noise)
    return found.cpu(), components.blocks.ran()


def usual_difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The median of the videos' own."""
    differences = [difference(a, b) for a, b in zip(found, exact, strict=True)]
    return statistics.median(differences)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("swap", [0, 5])
@pytest.mark.parametrize("quantization", ["none", "fp8_scaled", "fp4_scaled"])
@pytest.mark.parametrize("mode", MODES)
def test_every_cell_is_as_near_as_the_plain_block(
    mode: str, quantization: str, swap: int, cfg: float
) -> None:
    plan = planned(attention=mode, quantization=quantization, block_swap=swap, cfg=cfg)
    prepared = plan.attention.main.row.name == HOPPER.prepares
    assert plan.blocks.row == (HOPPER if prepared else FUSED)
    exact = exact_latents(cfg)
    fused, ran = latents(plan)
    plain, _ = latents(replace(plan, blocks=BlockPlan(row=PLAIN)))
    error, usual = usual_difference(fused, exact), usual_difference(plain, exact)
    # Two roundings of the same numbers.
    assert error < 1.1 * usual, (error, usual)
    (row,) = ran
    assert row["implementation"] == plan.blocks.row.name
    assert ("prepare_projections" in row["kernels"]) is prepared


@pytest.mark.parametrize("tokens", [1000, 4160])
def test_attention_that_writes_fp8_is_as_near_as_its_output_rounded_after(tokens: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    from sagewan.kernels import hopper_attention

    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v = (
        torch.randn(2, tokens, 5, 128, generator=generator, device="cuda").bfloat16()
        for _ in range(3)
    )
    v[1] *= 30
    prepared = hopper_attention.prepare_sageattn_3_fp8(*(x.transpose(1, 2) for x in (q, k, v)))
    out = hopper_attention.attend(prepared)
    assert isinstance(out, torch.Tensor)
    exact = out.transpose(1, 2).flatten(2).float()
    rows = Fp8Rows.within(q.flatten(2), hopper_attention.output_scale(prepared))
    target = rows.data.view(q.shape).transpose(1, 2)
    hopper_attention.attend(prepared, out=target)
    usual = fp8_linear.quantize_rows(exact.bfloat16())
    error, expected = (
        float((x.data.float() * x.scale - exact).norm() / exact.norm()) for x in (rows, usual)
    )
    assert error < 1.05 * expected < 0.035, (error, expected)


def test_the_fused_path_is_the_one_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(attention="sdpa", quantization="fp8_scaled")  # Its self-test is over.
    launched: list[str] = []
    for module in (token_rows, fp8_linear):
        launch = module.launch

        def counted(kernel: Any, *others: Any, launch: Any = launch) -> None:
            launched.append(kernel.__name__)
            launch(kernel, *others)

        monkeypatch.setattr(module, "launch", counted)
    request = Request(
        prompt="a red ball rolls to the right",
        output=tmp_path / "a.mp4",
        attention="sdpa",
        quantization="fp8_scaled",
        steps=2,
        seed=1,
    )
    report = generate(request).report
    (ran,) = report["blocks"]["ran"]
    calls = sum(row["calls"] for row in report["attention"]["ran"])
    assert (ran["implementation"], ran["calls"]) == (FUSED.name, calls)
    assert report["blocks"]["why_not_fused"] is None
    kernels = ran["kernels"]
    # Where the products add themselves, nothing is left that is added but not normalised.
    added = [row for row in report["weights"]["compute"] if "added" in row["compute"]]
    assert bool(added) is (torch.cuda.get_device_capability() == (9, 0))
    assert kernels["add_and_norm"] >= (3 if added else 4) * calls
    assert kernels["norm_and_rotate"] >= 3 * calls
    assert launched.count("_norm_kernel") == kernels["add_and_norm"]
    assert launched.count("_rotate_kernel") == kernels["norm_and_rotate"]
