from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.errors import Cancelled
from sagewan.model import block
from sagewan.model.attention import Attention
from sagewan.pipeline.build import build
from sagewan.pipeline.conditions import Conditions, encode
from sagewan.pipeline.decode import decode, decode_batch
from sagewan.pipeline.denoise import NotFinite, denoise, predict, start
from sagewan.pipeline.guard import FrameGuard
from sagewan.pipeline.progress import Event, Watch
from sagewan.plan.budget.transformer import Chunks
from sagewan.plan.plan import Plan
from sagewan.plan.request import SCHEDULERS
from tests.pipeline.runs import latents_of, picture, plan_for

Folder = Callable[[str], Path]
T2V = "wan2.1-t2v-1.3b"


@pytest.fixture
def plan(shrunken_folder: Folder) -> Plan:
    return plan_for(shrunken_folder(T2V), steps=5)


def conditioned(plan: Plan, launcher: Launcher) -> tuple[Any, Conditions]:
    components = build(plan, launcher)
    return components, encode(components, plan, {})


class Spoiling(Launcher):
    """Gives NaN from one call on, as a broken kernel does."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls_left = call

    def attend(self, *arguments: Any, **more: Any) -> torch.Tensor:
        self.calls_left -= 1
        out = super().attend(*arguments, **more)
        return out if self.calls_left >= 0 else out * torch.nan


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("step", [0, 3])
def test_a_run_goes_on_from_before_the_step_that_failed(
    scheduler: str, step: int, plan: Plan
) -> None:
    plan = replace(plan, steps=replace(plan.steps, scheduler=scheduler))
    whole = latents_of(plan)
    # Two layers, two passes a step.
    components, conditions = conditioned(plan, Spoiling(4 * step + 2))
    with pytest.raises(NotFinite, match=f"at step {step + 1}") as failure:
        denoise(components, plan, conditions, Watch())
    assert failure.value.step == failure.value.snapshot.step == step
    assert failure.value.snapshot.latents.isfinite().all()
    sound, conditions = conditioned(plan, Launcher())
    for _ in range(2):  # a snapshot can be used again
        resumed = denoise(sound, plan, conditions, Watch(), resume=failure.value.snapshot)
        assert torch.equal(resumed, whole)


def test_calls_are_layers_times_forwards(plan: Plan) -> None:
    launcher = Launcher()
    latents_of(plan, launcher)
    assert sum(row["calls"] for row in launcher.ran()) == 2 * 2 * 5
    launcher = Launcher()
    latents_of(replace(plan, steps=replace(plan.steps, cfg=1.0)), launcher)
    assert sum(row["calls"] for row in launcher.ran()) == 2 * 5


def test_progress_is_told_step_by_step(plan: Plan) -> None:
    events: list[Event] = []
    components, conditions = conditioned(plan, Launcher())
    denoise(components, plan, conditions, Watch(events.append))
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("denoise", done, 5) for done in range(6)
    ]


def test_cancelling_ends_the_run_within_a_block(plan: Plan) -> None:
    watch = Watch()

    class Cancelling(Launcher):
        def attend(self, *arguments: Any, **more: Any) -> torch.Tensor:
            watch.cancel()
            return super().attend(*arguments, **more)

    launcher = Cancelling()
    components, conditions = conditioned(plan, launcher)
    with pytest.raises(Cancelled):
        denoise(components, plan, conditions, watch)
    assert sum(row["calls"] for row in launcher.ran()) == 1


def test_noise_is_that_of_the_seed_on_the_cpu(plan: Plan) -> None:
    expected = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(start(plan).latents, expected)
    torch.manual_seed(3)
    assert torch.equal(start(plan).latents, expected)
    assert not torch.equal(start(replace(plan, seed=8)).latents, expected)
    start(replace(plan, seed=2**63 - 1))


@pytest.mark.parametrize("boundary", [0.0, 0.9, 1.0])
def test_each_expert_takes_its_steps(
    boundary: float, shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(shrunken_folder("wan2.2-t2v-a14b"), boundary=boundary, steps=4, shift=5.0)
    launched: list[str] = []
    from sagewan.pipeline.build import Part

    on = Part.on
    monkeypatch.setattr(
        Part, "on", lambda self, *a, **k: launched.append(self.name) or on(self, *a, **k)
    )
    latents_of(plan)
    names = [name for name in launched if name.startswith("transformer")]
    expected = {0.0: [1, 0], 0.9: [1, 1], 1.0: [0, 1]}[boundary]
    # The first time of UniPC is a millionth below 1000, so a boundary of 1 leaves none above.
    assert [names.count("transformer"), names.count("transformer_2")] == expected


def test_the_given_first_frame_stays(shrunken_folder: Folder, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 1)
    plan = plan_for(shrunken_folder("wan2.2-ti2v-5b"), image=path)
    components = build(plan, Launcher())
    from tests.pipeline.runs import pictures_of

    conditions = encode(components, plan, pictures_of(plan))
    latents = denoise(components, plan, conditions, Watch())
    assert conditions.latents is not None
    assert torch.equal(latents[:, :, :1], conditions.latents)


def test_sixteen_bit_runs_keep_their_latents_in_float32(shrunken_folder: Folder) -> None:
    folder = shrunken_folder(T2V)
    exact = latents_of(plan_for(folder, scheduler="flow-euler"))
    rounded = latents_of(plan_for(folder, scheduler="flow-euler", dtype="bfloat16"))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded.bfloat16().float(), rounded)
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("name", [T2V, "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
def test_a_batch_is_its_videos(name: str, shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder(name), steps=3)
    components, conditions = conditioned(plan, Launcher())
    seeds = (7, 8, 9)
    alone = [
        denoise(components, plan, conditions, Watch(), resume=start(plan, (seed,)))
        for seed in seeds
    ]
    together = denoise(components, plan, conditions, Watch(), resume=start(plan, seeds))
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    points = [(1, together), (2, together * 0.5)]
    of_batch = predict(components, plan, conditions, points)
    of_one = predict(components, plan, conditions, [(step, x[1:2]) for step, x in points])
    for found, expected in zip(of_batch, of_one, strict=True):
        assert torch.allclose(found[1:2], expected, atol=1e-4)
    chunked = replace(plan, memory=replace(plan.memory, chunks=Chunks(tokens=3, heads=1)))
    for found, expected in zip(
        predict(components, chunked, conditions, points), of_batch, strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-4)
    tiled = replace(plan, memory=replace(plan.memory, decode_tile=(3, 2)))
    for each in (plan, tiled):
        frames = decode_batch(components, each, together)
        own = np.stack(list(decode(components, each, together[2:], FrameGuard())))
        assert frames.dtype == torch.uint8
        assert np.abs(frames[2].numpy().astype(int) - own).max() <= 1


@pytest.mark.parametrize("name", [T2V, "wan2.2-t2v-a14b"])
def test_keys_and_values_of_the_texts_are_computed_once(
    name: str, shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(shrunken_folder(name), steps=5)
    assert plan.memory.text_keys > 0
    without = replace(plan, memory=replace(plan.memory, text_keys=0))
    compute, computed = block.text_keys, []

    def counted(attn: Any, text: torch.Tensor) -> Any:
        computed.append(attn)
        return compute(attn, text)

    monkeypatch.setattr(block, "text_keys", counted)
    turns: list[Any] = []
    during = Attention.during
    monkeypatch.setattr(
        Attention, "during", lambda self, turn: turns.append(turn) or during(self, turn)
    )
    kept = latents_of(plan)
    assert [turn.known for turn in turns] == [{}]
    layers, texts = 2, 2
    # Each expert has its own.
    assert len(computed) == layers * texts * plan.model.experts
    computed.clear()
    assert torch.equal(latents_of(without), kept)
    assert len(computed) == layers * texts * plan.steps.count
