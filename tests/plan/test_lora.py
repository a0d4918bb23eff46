from pathlib import Path

import pytest

from sagewan.errors import RequestError
from sagewan.plan.evidence import Evidence
from sagewan.plan.lora import Lora, LoraFile, Schedule, expert_in_name, schedule_in_name
from sagewan.plan.models import PUBLISHED
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request
from tests.machines import WAN_14B, machine


@pytest.mark.parametrize(
    ("text", "path", "strength", "expert"),
    [
        ("a.safetensors", "a.safetensors", 1.0, None),
        ("a.safetensors:0.8", "a.safetensors", 0.8, None),
        ("a.safetensors:-1", "a.safetensors", -1.0, None),
        ("high=a.safetensors:.5", "a.safetensors", 0.5, "high"),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0, None),
        (r"low=C:\a.safetensors:2", r"C:\a.safetensors", 2.0, "low"),
        ("x=1.safetensors", "x=1.safetensors", 1.0, None),
    ],
)
def test_how_it_is_written(text: str, path: str, strength: float, expert: str | None) -> None:
    lora = Lora.parse(text)
    assert lora == Lora(path=Path(path), strength=strength, expert=expert)
    assert Lora.parse(str(lora)) == lora


@pytest.mark.parametrize("text", ["", "a.safetensors:11", "a.safetensors:-10.5"])
def test_what_is_wrong_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="lora="):
        Lora.parse(text)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", 4),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", 4),
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022", 4),
        ("Wan21_CausVid_14B_T2V_lora_rank32_8step", 8),
        ("demo-4-step", 4),
        ("paper_cut_style", None),
        ("trained_3000steps_style", None),
        ("footsteps", None),
    ],
)
def test_a_distilled_one_is_told_by_its_name(name: str, steps: int | None) -> None:
    found = schedule_in_name(name)
    assert (found and found.steps) == steps
    if found:
        assert (found.cfg, found.shift) == (1.0, 5.0)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_high_noise.safetensors", 0),
        ("WAN22-LOW.safetensors", 1),
        ("lownoise_x.safetensors", 1),
        ("high_and_low.safetensors", None),
        ("yellow.safetensors", None),
        ("slow-motion.safetensors", None),
    ],
)
def test_an_expert_is_told_by_its_name(name: str, expert: int | None) -> None:
    assert expert_in_name(name) == expert


def file(schedule: Schedule | None = None) -> LoraFile:
    return LoraFile(
        lora=Lora(path=Path("a.safetensors")),
        layers=("blocks.0.attn1.to_q",),
        unmatched=(),
        experts=(0,),
        rank=8,
        nbytes=100,
        schedule=schedule,
    )


def planned(*loras: LoraFile, model: str = WAN_14B.name, **fields: object) -> Plan:
    request = Request(prompt="a cat", **fields)  # type: ignore[arg-type]
    return make_plan(request, PUBLISHED[model], machine("H100"), Evidence(), loras)


def test_a_distilled_one_brings_its_schedule() -> None:
    steps = planned(file(Schedule(steps=4))).steps
    assert (steps.count, steps.cfg, steps.shift, steps.scheduler) == (4, 1.0, 5.0, "euler")
    asked = planned(file(Schedule(steps=4)), steps=6, cfg=2.0, shift=8.0, scheduler="unipc")
    assert (asked.steps.count, asked.steps.cfg, asked.steps.shift) == (6, 2.0, 8.0)
    assert asked.steps.scheduler == "unipc"
    assert any("another number of steps (4) than will run (6)" in note for note in asked.notes)
    second = planned(file(Schedule(steps=4)), model="wan2.2-t2v-a14b").steps
    assert (second.cfg, second.cfg_2, second.boundary) == (1.0, 1.0, 0.875)


def test_an_ordinary_one_changes_no_schedule_but_with_four_steps() -> None:
    assert planned(file()).steps == planned().steps
    plan = planned(file(), steps=4)
    assert (plan.steps.cfg, plan.steps.shift) == (1.0, 5.0)
    assert any("taken for a distilled one" in note for note in plan.notes)


def test_the_preset_of_few_steps_says_when_none_is_loaded() -> None:
    def warned(plan: Plan) -> bool:
        return any("none is loaded" in note for note in plan.notes)

    assert warned(planned(preset="low-vram"))
    assert warned(planned(file(), preset="low-vram"))
    assert not warned(planned(file(Schedule(steps=4)), preset="low-vram"))


def test_what_it_changes_is_said() -> None:
    assert any(
        "LoRA a.safetensors at 1, rank 8: changes 1 layer" in n for n in planned(file()).notes
    )
