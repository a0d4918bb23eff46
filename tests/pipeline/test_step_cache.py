"""What is reused, what is computed, and what is told of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sagewan.attention.launch import Launcher
from sagewan.pipeline import generate
from sagewan.pipeline.denoise import NotFinite, denoise
from sagewan.pipeline.export import read_settings
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.step_cache import NEGATIVE, PROMPT, Forwards, Reuse
from sagewan.plan.plan import Plan
from sagewan.plan.request import Request
from sagewan.plan.serialize import settings_from_json
from sagewan.plan.step_cache import StepCache, plan_cache
from tests.pipeline.runs import difference, latents_of, plan_for
from tests.pipeline.test_denoise import Spoiling, conditioned

Folder = Callable[[str], Path]
T2V, A14B = "wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"


def cached(plan: Plan, text: str) -> Plan:
    return replace(plan, cache=plan_cache(StepCache.parse(text), plan.steps.passes))


def walk(
    answer: Callable[[Tensor], Tensor], threshold: float, steps: int = 20
) -> tuple[list[Tensor], list[bool], Forwards]:
    """A cache along a straight line of latents: its answers, and which of them were computed."""
    forwards = Forwards()
    plan = plan_cache(StepCache(method="easy", threshold=threshold), [1] * steps)
    reuse, answers, computed = Reuse(plan, forwards), [], []
    for step in range(steps):
        latents = torch.full((1, 4), 1 + step / steps)
        calls: list[Tensor] = []

        def compute(
            videos: Tensor | None, calls: list[Tensor] = calls, latents: Tensor = latents
        ) -> Tensor:
            assert videos is None  # there is one alone
            calls.append(latents)
            return answer(latents)

        answers.append(reuse.forward(step, 0, PROMPT, latents, compute))
        computed.append(bool(calls))
    return answers, computed, forwards


def test_an_answer_that_never_changes_is_computed_at_the_ends_alone() -> None:
    _, computed, forwards = walk(torch.ones_like, 0.01)
    assert computed == [step < 4 or step == 19 for step in range(20)]
    assert forwards.count == 20
    assert forwards.reused == 15
    assert forwards.steps() == tuple(range(5, 20))


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_where_the_rate_is_constant_no_answer_is_further_off_than_the_threshold(
    threshold: float,
) -> None:
    answers, computed, _ = walk(lambda x: 2 * x, threshold)
    assert not all(computed)
    for step, answer in enumerate(answers):
        right = 2 * torch.full((1, 4), 1 + step / 20)
        # What is told is relative to the answer that is reused, which is the smaller one.
        assert float((answer - right).abs().mean() / answer.abs().mean()) < threshold * 1.001


def test_more_is_reused_where_more_may_change() -> None:
    reused = [walk(lambda x: 2 * x, threshold)[2].reused for threshold in (0.02, 0.1, 0.3)]
    assert reused == sorted(reused)
    assert reused[0] < reused[2]


def test_the_pass_without_the_prompt_follows_the_one_with_it() -> None:
    forwards = Forwards()
    reuse = Reuse(plan_cache(StepCache(method="easy", threshold=1.0), [2] * 10), forwards)
    latents = torch.ones(1, 4)
    for step in range(10):
        before = forwards.reused
        for part, answer in ((PROMPT, 3.0), (NEGATIVE, step + 5.0)):
            found = reuse.forward(step, 0, part, latents, lambda _, answer=answer: latents * answer)  # type: ignore[misc]
        assert forwards.reused - before in (0, 2)
        assert float(found.mean()) <= step + 5.0
    assert forwards.reused == 2 * 7


def test_each_video_of_a_batch_is_reused_as_it_is_alone() -> None:
    """Of three videos one never changes, one changes slowly, one fast: each is computed when it
    would be alone, and gets its own answers."""
    speeds = torch.tensor([[0.0], [0.8], [3.0]])
    plan = plan_cache(StepCache(method="easy", threshold=0.1), [2] * 20)

    def course(speeds: Tensor) -> tuple[list[Tensor], Forwards, list[int]]:
        forwards, answers, sizes = Forwards(), [], []
        reuse = Reuse(plan, forwards)
        for step in range(20):
            latents = torch.full((len(speeds), 4), 1 + step / 20)
            for part, offset in ((PROMPT, 1.0), (NEGATIVE, -1.0)):
                every = offset + speeds * latents

                def compute(videos: Tensor | None, every: Tensor = every) -> Tensor:
                    chosen = every if videos is None else every[videos]
                    sizes.append(len(chosen))
                    return chosen

                answers.append(reuse.forward(step, 0, part, latents, compute))
        return answers, forwards, sizes

    answers, forwards, sizes = course(speeds)
    assert forwards.count == 40
    assert {1, 2, 3} <= set(sizes)
    shares = forwards.shares()
    assert shares[0] > shares[1] > shares[2] > 0
    for place, speed in enumerate(speeds):
        alone, of_one, _ = course(speed[None])
        assert of_one.shares() == [shares[place]]
        for together, by_itself in zip(answers, alone, strict=True):
            torch.testing.assert_close(together[place], by_itself[0])
    # Of the batch only what was computed for none is counted as left out.
    assert forwards.reused / forwards.count <= shares[2]


def test_a_cache_that_reuses_nothing_changes_no_bit(shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder(T2V), steps=6)
    launcher = Launcher()
    assert torch.equal(latents_of(cached(plan, "easy:0.0000001"), launcher), latents_of(plan))
    assert sum(row["calls"] for row in launcher.ran()) == 2 * 2 * 6


def test_calls_are_layers_times_what_was_computed(shrunken_folder: Folder) -> None:
    plan = cached(plan_for(shrunken_folder(T2V), steps=8), "easy:1")
    launcher = Launcher()
    components, conditions = conditioned(plan, launcher)
    latents = denoise(components, plan, conditions, Watch())
    forwards = components.forwards
    assert forwards.count == 16
    assert 0 < forwards.reused <= plan.cache.reusable
    assert sum(row["calls"] for row in launcher.ran()) == 2 * (16 - forwards.reused)
    assert 0 < difference(latents, latents_of(replace(plan, cache=None))) < 1


def test_each_expert_is_asked_anew(shrunken_folder: Folder) -> None:
    plan = cached(plan_for(shrunken_folder(A14B), steps=10, shift=5.0), "easy:1")
    components, conditions = conditioned(plan, Launcher())
    denoise(components, plan, conditions, Watch())
    steps = components.forwards.steps()
    switch = next(
        step for step, time in enumerate(_times(plan), 1) if time < plan.steps.boundary * 1000
    )
    assert steps
    assert 3 < switch < 9
    assert not {switch, switch + 1} & set(steps)


def _times(plan: Plan) -> list[float]:
    from sagewan.pipeline.denoise import start

    return [float(time) for time in start(plan).sampler.times]


@pytest.mark.parametrize("call", [2, 9, 13])
def test_a_run_goes_on_with_what_it_knew(call: int, shrunken_folder: Folder) -> None:
    plan = cached(plan_for(shrunken_folder(T2V), steps=8), "easy:0.3")
    whole = latents_of(plan)
    broken, conditions = conditioned(plan, Spoiling(call))
    with pytest.raises(NotFinite) as failure:
        denoise(broken, plan, conditions, Watch())
    for _ in range(2):  # a snapshot can be used again
        sound, conditions = conditioned(plan, Launcher())
        resumed = denoise(sound, plan, conditions, Watch(), resume=failure.value.snapshot)
        assert torch.equal(resumed, whole)


def test_a_video_is_made_again_from_itself_and_says_what_it_reused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"size": (64, 64), "frames": 5, "steps": 8, "seed": 2}
    request = Request(
        prompt="a red ball", output=tmp_path / "a.mp4", cache=StepCache.parse("easy:0.4"), **small
    )
    first = generate(request)
    facts = first.report["cache"]
    assert facts["requested"] == "easy:0.4"
    assert facts["forwards"] == 16
    assert 0 < facts["reused"] == 2 * len(facts["steps"])
    kept = settings_from_json(read_settings(request.output))
    again = generate(Request(**kept | {"output": tmp_path / "b.mp4"}))
    assert again.report["output"]["sha256"] == first.report["output"]["sha256"]
    assert again.report["cache"] == facts
    plain = generate(replace(request, output=tmp_path / "c.mp4", cache=None))
    assert plain.report["cache"] is None
