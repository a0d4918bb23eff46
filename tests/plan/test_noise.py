"""Which expert has which step, and how many forward passes that makes, before anything runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagewan.pipeline.schedulers import make_sampler
from sagewan.plan.evidence import Evidence
from sagewan.plan.models import PUBLISHED
from sagewan.plan.noise import expert_at, step_times
from sagewan.plan.plan import make_plan
from sagewan.plan.request import SCHEDULERS, Request
from sagewan.plan.speed import estimated_seconds
from sagewan.plan.step_cache import StepCache
from tests.machines import machine

A14B = PUBLISHED["wan2.2-t2v-a14b"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 2.123])
def test_the_times_are_the_schedulers_own(name: str, shift: float) -> None:
    for steps in (1, 2, 3, 4, 7, 20, 30, 50):
        sampler = make_sampler(
            name, shift=shift, steps=steps, generator=torch.Generator(), device="cpu"
        )
        times = step_times(name, shift=shift, steps=steps)
        assert times == pytest.approx(sampler.times.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_time_on_the_boundary_has_the_expert_that_denoises_it(name: str) -> None:
    # One of these times is the boundary itself.
    for steps, shift, boundary in ((24, 5.0, 0.875), (48, 5.0, 0.5), (13, 12.0, 0.5)):
        sampler = make_sampler(
            name, shift=shift, steps=steps, generator=torch.Generator(), device="cpu"
        )
        times = step_times(name, shift=shift, steps=steps)
        planned = [expert_at(time, boundary) for time in times]
        assert planned == [expert_at(float(time), boundary) for time in sampler.times]


@given(time=st.floats(0, 1000), boundary=st.floats(0, 1))
def test_the_first_expert_has_the_noisy_times(time: float, boundary: float) -> None:
    assert expert_at(time, boundary) == (0 if time >= boundary * 1000 else 1)
    assert expert_at(time, None) == 0


@pytest.mark.parametrize(("cfg", "cfg_2"), [(4.0, 3.0), (4.0, 1.0), (1.0, 3.0), (1.0, 1.0)])
def test_an_expert_without_guidance_makes_one_pass_a_step(cfg: float, cfg_2: float) -> None:
    request = Request(
        prompt="x", steps=20, cfg=cfg, cfg_2=cfg_2, cache=StepCache.parse("easy:0.05")
    )
    plan = make_plan(request, A14B, machine("H100"), Evidence())
    noisy = plan.steps.experts.count(0)
    assert 0 < noisy < 20
    forwards = noisy * (1 + (cfg > 1)) + (20 - noisy) * (1 + (cfg_2 > 1))
    assert sum(plan.steps.passes) == forwards
    assert plan.cache
    assert plan.cache.forwards == forwards
    assert plan.cache.reusable == sum(
        passes for step, passes in enumerate(plan.steps.passes) if not plan.cache.always(step)
    )


def test_the_minutes_count_the_passes_of_each_expert() -> None:
    def seconds(cfg: float, cfg_2: float) -> float:
        request = Request(prompt="x", steps=20, cfg=cfg, cfg_2=cfg_2, attention="sdpa")
        found = estimated_seconds(make_plan(request, A14B, machine("H100"), Evidence()))
        assert found
        return found

    none, first, second, both = (seconds(a, b) for a in (1.0, 4.0) for b in (1.0, 3.0))
    assert none < min(first, second) <= max(first, second) < both
    assert first + second == pytest.approx(none + both)
