"""What a step cache may leave out, before anything runs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagewan.errors import RequestError
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from sagewan.plan.serialize import plan_to_json, settings_from_json, settings_of
from sagewan.plan.speed import estimated_seconds
from sagewan.plan.step_cache import StepCache, plan_cache
from tests.machines import DEMO, WAN_14B, machine

EASY = StepCache.parse("easy:0.05")


@given(st.floats(1e-6, 1))
def test_a_cache_is_read_as_it_is_written(threshold: float) -> None:
    cache = StepCache(method="easy", threshold=float(f"{threshold:.10g}"))
    assert StepCache.parse(str(cache)) == cache


@pytest.mark.parametrize("text", ["", "easy", "easy:", "easy:0", "easy:-1", "easy:2", "tea:0.1"])
def test_what_is_no_cache_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RequestError, match=r"such as easy:0\.05"):
        StepCache.parse(text)


@given(st.integers(1, 1000), st.integers(1, 2))
def test_the_first_and_last_steps_are_computed_and_the_rest_may_be_reused(
    steps: int, branches: int
) -> None:
    plan = plan_cache(EASY, [branches] * steps)
    assert plan is not None
    free = [step for step in range(steps) if not plan.always(step)]
    assert plan.reusable == branches * len(free)
    assert plan.forwards == branches * steps
    assert not {0, 1, steps - 1} & set(free)
    if steps >= 5:
        assert free


def test_a_plan_says_what_can_be_reused_at_most_and_where_that_is_nothing() -> None:
    request = Request(prompt="a red ball", steps=16, cache=EASY, attention="sdpa")
    plan = make_plan(request, DEMO, machine(), Evidence())
    assert plan.cache
    assert plan_to_json(plan)["cache"]["reusable"] == plan.cache.reusable > 0
    few = make_plan(replace(request, steps=3), DEMO, machine(), Evidence())
    assert any("can leave out no step: of 3" in note for note in few.notes)
    assert not any("leave out" in note for note in plan.notes)


def test_the_time_stays_that_of_every_step() -> None:
    request = Request(prompt="a red ball", attention="sdpa")
    card = machine("H100")
    plain = make_plan(request, WAN_14B, card, Evidence())
    cached = make_plan(replace(request, cache=EASY), WAN_14B, card, Evidence())
    assert estimated_seconds(cached) == estimated_seconds(plain)


MAG = StepCache.parse("mag:0.06")


def mag(magnitudes: list[float | None], text: str = "mag:0.06") -> tuple[int, ...]:
    plan = plan_cache(StepCache.parse(text), [2] * len(magnitudes), tuple(magnitudes))
    assert plan
    assert plan.reused is not None
    assert plan.reusable == 2 * len(plan.reused)
    return plan.reused


def test_steps_are_reused_while_the_factors_tell_of_little() -> None:
    assert mag([None, *[1.0] * 9]) == (2, 3, 5, 6, 8)  # never three in a row, nor the last
    assert mag([None, *[0.96] * 9]) == (2, 4, 6, 8)  # .04, then .04 + .078
    assert mag([None, *[0.9] * 9]) == ()
    assert mag([None, *[0.9] * 9], "mag:0.15") == (2, 4, 6, 8)


def test_no_step_is_reused_where_another_expert_begins() -> None:
    reused = mag([None, *[1.0] * 4, None, *[1.0] * 6])
    assert 5 not in reused
    assert reused


@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=40), st.floats(0.01, 1))
def test_the_ends_are_computed_and_no_three_steps_in_a_row_are_reused(
    factors: list[float], threshold: float
) -> None:
    reused = set(mag([None, *factors], f"mag:{threshold:.10g}"))
    assert not {0, 1, len(factors)} & reused
    assert not any({step, step + 1, step + 2} <= reused for step in reused)


def test_what_was_not_measured_is_known_and_what_was_takes_less_time() -> None:
    request = Request(prompt="a red ball", attention="sdpa", steps=10, cache=MAG)
    without = make_plan(request, WAN_14B, machine("H100"), Evidence())
    assert without.cache
    assert not without.cache.calibrated
    other = Evidence(magnitudes=(None, *[1.0] * 19))
    found = make_plan(request, WAN_14B, machine("H100"), other).cache
    assert found
    assert not found.calibrated, "measured for another number of steps"
    plan = make_plan(request, WAN_14B, machine("H100"), Evidence(magnitudes=(None, *[1.0] * 9)))
    assert plan.cache
    assert plan.cache.calibrated
    assert estimated_seconds(plan) < estimated_seconds(without)  # type: ignore[operator]
    names = [item.name for stage in plan.memory.stages for item in stage.items if item.device]
    assert "step cache" in names
    assert plan_to_json(plan)["cache"]["steps"] == [3, 4, 6, 7, 9]


@given(st.sets(st.integers(1, 40)), st.integers(1, 40))
def test_what_was_reused_is_read_as_it_is_written(steps: set[int], count: int) -> None:
    named = ",".join(map(str, sorted(steps)))
    if steps and max(steps) > count:
        with pytest.raises(RequestError, match=r"such as easy:0\.05"):
            StepCache.parse(f"mag:0.1@{named}/{count}")
        return
    cache = StepCache.parse(f"mag:0.1@{named}/{count}")
    assert str(cache) == f"mag:0.1@{named}/{count}"
    assert StepCache.parse(str(cache)) == cache


@pytest.mark.parametrize("text", ["mag:0.1@", "mag:0.1@3", "mag:0.1@4,3/9", "easy:0.1@3/9"])
def test_steps_that_no_run_reused_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="cache="):
        StepCache.parse(text)


def test_a_run_made_again_reuses_the_same_steps_whatever_was_measured_since() -> None:
    request = Request(prompt="a red ball", attention="sdpa", steps=10, cache=MAG)
    first = make_plan(request, WAN_14B, machine("H100"), Evidence(magnitudes=(None, *[1.0] * 9)))
    assert first.cache
    assert first.cache.reused
    again = Request(**settings_from_json(settings_of(first)))
    assert again.cache != MAG
    for since in (None, (None, *[9.0] * 9)):
        plan = make_plan(again, WAN_14B, machine("H100"), Evidence(magnitudes=since))
        assert plan.cache
        assert (plan.cache.reused, plan.cache.calibrated) == (first.cache.reused, True)
        assert plan.cache.as_made == again.cache
    # Of another number of steps nothing is recorded.
    longer = replace(again, steps=12)
    plan = make_plan(longer, WAN_14B, machine("H100"), Evidence(magnitudes=(None, *[9.0] * 11)))
    assert plan.cache
    assert plan.cache.reused == ()
    assert any("names steps of a run of 10, and 12 will run" in note for note in plan.notes)
