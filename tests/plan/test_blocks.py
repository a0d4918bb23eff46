from dataclasses import replace

import pytest

from sagewan.plan.attention import AttentionPlan, Choice
from sagewan.plan.blocks import BlockPlan, plan_blocks
from sagewan.plan.catalogue import Problem, row_named
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.objection import Objection
from tests.machines import DEMO, WAN_14B, machine

PACKAGES = {"triton": "3.6.0", "cuda_bindings": "13.0.0"}
HOPPER = "sagewan.sageattn_3_fp8_hopper"


def attending(name: str = "torch.sdpa", dtype: str = "bfloat16") -> AttentionPlan:
    choice = Choice("", row_named(name))
    return AttentionPlan(requested="", problem=Problem(head_dim=128, dtype=dtype), main=choice)


def planned(
    *gpus: str,
    attention: str = "torch.sdpa",
    dtype: str = "bfloat16",
    evidence: Evidence | None = None,
) -> BlockPlan:
    hardware = machine(*gpus, **PACKAGES)
    device = hardware.device("auto")
    return plan_blocks(
        WAN_14B, attending(attention, dtype), device, hardware, evidence or Evidence()
    )


def evidence_of(objection: Objection | None) -> Evidence:
    test = SelfTest(
        implementation="sagewan.fused_block",
        error=0.01,
        limit=0.02,
        milliseconds=None,
        objection=objection,
    )
    return Evidence().with_test(test)


@pytest.mark.parametrize("gpu", ["3080", "4090", "H100", "5090"])
def test_blocks_are_fused_on_a_gpu_once_that_is_proved(gpu: str) -> None:
    plan = planned(gpu)
    assert plan.row.fused
    assert plan.unproven == (plan.row,)
    assert plan.why() == ""
    assert planned(gpu, evidence=evidence_of(None)).unproven == ()


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (planned(), "needs an NVIDIA GPU"),
        (planned("H100", dtype="float32"), "the model runs in float32"),
        (planned("H100", evidence=evidence_of(Objection("self-test-not-finite"))), "gave NaN"),
    ],
)
def test_else_they_are_not_and_it_is_said_why(plan: BlockPlan, why: str) -> None:
    assert plan.row.name == "sagewan.block"
    assert plan.unproven == ()
    assert why in plan.why()


def test_a_failure_in_use_outweighs_a_passed_test() -> None:
    evidence = evidence_of(None).with_failure(
        "sagewan.fused_block", Objection("run-failed", {"error": "x"})
    )
    assert not planned("H100", evidence=evidence).row.fused


def test_what_a_kernel_does_not_take() -> None:
    hardware = machine("H100", **PACKAGES)
    device = hardware.device("auto")
    for model, why in (
        (replace(DEMO, head_dim=96), "head sizes 64, 128, 256, and the model's is 96"),
        (replace(DEMO, ffn=20000), "up to 16384 values, and the model's have 20000"),
    ):
        plan = plan_blocks(model, attending(), device, hardware, Evidence())
        assert why in plan.why()
    missing = plan_blocks(DEMO, attending(), device, machine("H100"), Evidence())
    assert "triton is not installed" in missing.why()


def test_q_and_k_are_prepared_for_the_attention_that_runs() -> None:
    plan = planned("H100", attention=HOPPER)
    assert plan.row.prepares == HOPPER
    assert plan.unproven == (plan.row,)
    for other in (planned("H100"), planned("H100", attention="sagewan.sageattn_3_fp8")):
        assert other.row.fused
        assert other.row.prepares is None
        assert other.why() == ""
        assert "attends" in other.refused[0][1].sentence()
    failed = Evidence().with_failure(plan.row.name, Objection("run-failed", {"error": "x"}))
    assert planned("H100", attention=HOPPER, evidence=failed).row.name == "sagewan.fused_block"
    assert planned("4090", attention=HOPPER).row.prepares is None
