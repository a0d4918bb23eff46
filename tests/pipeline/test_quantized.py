"""What quantisation does to the demo model: its transformer's output, and whole small videos."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import find_model
from sagewan.pipeline import generate
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import encode
from sagewan.pipeline.denoise import Turn, _computed, _experts, _Forward, start
from sagewan.plan.evidence import Evidence
from sagewan.plan.lora import Lora
from sagewan.plan.modes import MODES
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import QUANTIZATIONS, Request
from tests.loras import pairs, write
from tests.machines import machine

PROMPTS = ("a red ball rolls to the right", "一个绿色的三角形向左移动")
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plan_of(prompt: str, quantization: str = "none", *, emulate: bool = False) -> Plan:
    request = Request(
        prompt=prompt,
        quantization=quantization,
        emulate=emulate,
        seed=1,
        steps=STEPS,
        attention="sdpa",
    )
    return make_plan(request, find_model("demo"), machine(), Evidence())


@contextmanager
def forward(plan: Plan) -> Iterator[_Forward]:
    components = build(plan, Launcher())
    conditions = encode(components, plan, {})
    turn = Turn(plan.attention, STEPS, lambda: None)
    with (
        torch.inference_mode(),
        components.attention.during(turn),
        _experts(components, plan) as expert,
    ):
        yield _Forward(expert(0), plan, conditions, turn)


@pytest.fixture(scope="module")
def path() -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Prompt, latents, time and predicted flow of each step of short runs in float32."""
    points = []
    for prompt in PROMPTS:
        plan = plan_of(prompt)
        state = start(plan)
        latents = state.latents
        with forward(plan) as model:
            for time in state.sampler.times:
                flow = model.guided(latents, time, 1.0, _computed)
                points.append((prompt, latents, time, flow))
                latents = state.sampler.step(flow, time, latents)
    return points


# ‖quantised − float32‖ / ‖float32‖ over all steps is .013 (FP8, unpacked), .021 (FP8 by FP8), .044
# (NVFP4, unpacked) and .072 (NVFP4 by NVFP4); rounded to the nearest .021, .027, .062 and .088.
@pytest.mark.parametrize(
    ("quantization", "emulate", "most"),
    [
        ("fp8_scaled", False, 0.016),
        ("fp8_scaled", True, 0.024),
        ("fp4_scaled", False, 0.052),
        ("fp4_scaled", True, 0.08),
    ],
)
def test_the_transformers_output_stays_near(
    quantization: str, emulate: bool, most: float, path: Any
) -> None:
    difference = size = 0.0
    for prompt in PROMPTS:
        with forward(plan_of(prompt, quantization, emulate=emulate)) as model:
            for own, latents, time, flow in path:
                if own == prompt:
                    difference += float(
                        (model.guided(latents, time, 1.0, _computed) - flow).norm() ** 2
                    )
                    size += float(flow.norm() ** 2)
    error = (difference / size) ** 0.5
    assert error < most


CELLS = list(itertools.product(MODES, QUANTIZATIONS[:3], (1.0, 3.0), (False, True)))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    with forward(plan_of(PROMPTS[0])) as model:
        return write(file, pairs(model.transformer, size=0.01))


def cell(folder: Path, mode: str, quantization: str, cfg: float, lora: Path | None) -> None:
    """A short, small video; one that is not finite, black or constant is rejected with an error."""
    request = Request(
        prompt=PROMPTS[0],
        output=folder / "a.mp4",
        size=(64, 64),
        frames=5,
        steps=3,
        seed=3,
        device="cpu",
        attention=mode,
        quantization=quantization,
        cfg=cfg,
        lora=(Lora(path=lora),) if lora else (),
        emulate=True,
    )
    report = generate(request).report
    assert report["attention"]["ran"][0]["mode"] == mode or mode == "flash_attn"
    compute = report["weights"]["compute"]
    ran = {row["implementation"] for row in compute} if quantization != "none" else set()
    assert any(name.startswith("emulated.") for name in ran) or quantization == "none"
    assert len(report["weights"]["lora"]) == (lora is not None)


# One cell of each row and column here; all of them take minutes.
@pytest.mark.parametrize(
    ("mode", "quantization", "cfg", "with_lora"),
    [
        ("sdpa", "fp8_scaled", 3.0, True),
        ("sageattn_3_fp8", "fp4_scaled", 1.0, True),
        ("sageattn_3_fp4", "fp4_scaled", 3.0, False),
        ("sageattn", "fp8_scaled", 1.0, False),
    ],
)
def test_no_cell_is_black(
    mode: str, quantization: str, cfg: float, with_lora: bool, lora: Path, tmp_path: Path
) -> None:
    cell(tmp_path, mode, quantization, cfg, lora if with_lora else None)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "quantization", "cfg", "with_lora"), CELLS)
def test_no_cell_of_the_whole_table_is_black(
    mode: str, quantization: str, cfg: float, with_lora: bool, lora: Path, tmp_path: Path
) -> None:
    cell(tmp_path, mode, quantization, cfg, lora if with_lora else None)
