"""The diagnosis from made-up machines and test results: nothing here imports a package."""

import json

import pytest

from sagewan.pipeline.doctor import Diagnosis, diagnose
from sagewan.plan.blocks import BlockRow
from sagewan.plan.catalogue import Implementation, Problem
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.modes import AUTO, MODES
from sagewan.plan.objection import Objection
from tests.machines import machine

FULL = machine(
    "H100",
    torch="2.13.0",
    triton="3.7.1",
    comfy_kitchen="0.2.40",
    sageattention="1.0.6",
    flash_attn_4="4.0.0b36",
)
MILLISECONDS = {"torch.sdpa": 3.0, "flash_attn.cute": 2.0}


class Clinic:
    """Passes every row but those it is told to fail; remembers which it was asked for."""

    def __init__(self, **failing: Objection) -> None:
        self.failing = {name.replace("__", "."): value for name, value in failing.items()}
        self.asked: list[str] = []

    def __call__(
        self, row: Implementation | BlockRow, device: Device, problem: Problem
    ) -> SelfTest:
        self.asked.append(row.name)
        return SelfTest(
            implementation=row.name,
            error=0.002,
            limit=0.01,
            milliseconds=MILLISECONDS.get(row.name, 4.0),
            objection=self.failing.get(row.name),
        )


def examined(hardware: Hardware, **failing: Objection) -> Diagnosis:
    return diagnose(hardware, hardware.device("auto"), Clinic(**failing))


def test_on_a_machine_without_a_gpu_torch_serves_every_mode() -> None:
    tester = Clinic()
    hardware = machine(torch="2.13.0+cpu")
    diagnosis = diagnose(hardware, hardware.device("auto"), tester)
    assert tester.asked == ["torch.sdpa"]
    assert [mode.name for mode in diagnosis.modes] == [*MODES, AUTO]
    assert {mode.runs for mode in diagnosis.modes} == {"sdpa"}
    assert diagnosis.mode("sdpa").itself
    assert not diagnosis.mode("sageattn").itself
    assert "needs an NVIDIA GPU" in (diagnosis.mode("sageattn").why or "")
    assert diagnosis.advice == ()


def test_on_an_h100_each_installed_row_is_tried_once_torch_first() -> None:
    tester = Clinic()
    diagnose(FULL, FULL.device("auto"), tester)
    assert tester.asked == [
        "torch.sdpa",
        "flash_attn.cute",
        "sagewan.sageattn",
        "sageattention.sageattn_1",
        "comfy_kitchen.int8_attention",
        "sagewan.sageattn_3",
        "sagewan.sageattn_3_fp8",
        "sagewan.fused_block",
    ]


def test_ways_to_run_blocks_are_tried_too_and_the_last_needs_no_test() -> None:
    crashed = Objection("self-test-crashed", {"error": "no such instruction"})
    diagnosis = examined(FULL, sagewan__fused_block=crashed)
    tried = {block.row.name: block for block in diagnosis.blocks}
    assert [tried[name].objection for name in ("sagewan.fused_block", "sagewan.block")] == [
        crashed,
        None,
    ]
    hopper = tried["sagewan.fused_block_hopper"]
    assert hopper.objection is not None
    assert hopper.objection.code == "package-missing"
    passing = next(b for b in examined(FULL).as_dict()["blocks"] if b["name"].endswith("_block"))
    assert (passing["passed"], passing["error"], passing["fused"]) == (True, 0.002, True)


@pytest.mark.parametrize(
    ("hardware", "dtype"), [(FULL, "bfloat16"), (machine(torch="2.13.0+cpu"), "float32")]
)
def test_rows_are_tried_in_what_the_device_runs_by_default(hardware: Hardware, dtype: str) -> None:
    asked: list[Problem] = []

    def tester(row: Implementation | BlockRow, device: Device, problem: Problem) -> SelfTest:
        asked.append(problem)
        return Clinic()(row, device, problem)

    diagnose(hardware, hardware.device("auto"), tester)
    assert {(problem.head_dim, problem.dtype) for problem in asked} == {(128, dtype)}


def test_modes_say_what_runs_them_or_why_not() -> None:
    diagnosis = examined(FULL)
    assert diagnosis.mode("flash_attn").implementation == "flash_attn.cute"
    for mode in ("sageattn", "sageattn_3", "sageattn_3_fp8"):
        assert diagnosis.mode(mode).implementation == f"sagewan.{mode}"
        assert diagnosis.mode(mode).itself
    fp4 = diagnosis.mode("sageattn_3_fp4")
    assert (fp4.runs, fp4.itself) == ("sageattn_3", False)
    assert "compute capability 10.0" in (fp4.why or "")
    assert diagnosis.mode(AUTO).runs == "flash_attn"


def test_speed_is_against_torch_in_the_same_run() -> None:
    speeds = {tried.row.name: tried.speed for tried in examined(FULL).rows}
    assert speeds["torch.sdpa"] == 1
    assert speeds["flash_attn.cute"] == 1.5
    assert speeds["comfy_kitchen.int8_attention"] == 0.75
    assert speeds["sageattn3.blackwell"] is None


def test_a_failed_row_hands_its_mode_to_the_next() -> None:
    noise = Objection("self-test-error", {"error": "1.4", "limit": "0.035"})
    rows = ["sagewan__sageattn", "sageattention__sageattn_1", "comfy_kitchen__int8_attention"]
    for broken, following in ((1, "sageattention.sageattn_1"), (2, "comfy_kitchen.int8_attention")):
        diagnosis = examined(FULL, **dict.fromkeys(rows[:broken], noise))
        assert diagnosis.mode("sageattn").implementation == following
    all_broken = examined(FULL, **dict.fromkeys(rows, noise)).mode("sageattn")
    assert all_broken.runs == "sdpa"
    assert "error of 1.4" in (all_broken.why or "")


def test_advice_is_what_the_hardware_could_use_and_lacks() -> None:
    bare = examined(machine("H100", torch="2.13.0", triton="3.7.1"))
    text = "\n".join(bare.advice)
    assert "flash-attn-4" in text
    assert "sageattention==1.0.6" in text
    assert "SageAttention 3" not in text, "it needs Blackwell, which installing does not give"
    old = examined(machine("H100", torch="2.13.0", triton="3.7.1", comfy_kitchen="0.1.0"))
    assert any("kitchen" in line for line in old.advice)


def test_reasons_are_said_once() -> None:
    why = examined(machine(torch="2.13.0")).mode("sageattn_3_fp4").why or ""
    assert why.count("needs an NVIDIA GPU") == 1
    assert why.startswith("sageattn_3_fp4, sageattn_3, sageattn: ")


@pytest.mark.parametrize("hardware", [FULL, machine(torch="2.13.0+cpu"), machine("5090")])
def test_it_is_json(hardware: Hardware) -> None:
    values = json.loads(json.dumps(examined(hardware).as_dict()))
    assert {row["name"] for row in values["implementations"]} >= {"torch.sdpa"}
    for row in values["implementations"]:
        assert row["passed"] == (row["objection"] is None)
        assert row["objection"] is None or row["objection"]["sentence"]
    assert {mode["name"] for mode in values["modes"]} == {*MODES, AUTO}
    assert values["hardware"]["packages"] == dict(hardware.packages)
