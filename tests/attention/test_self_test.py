"""The self-test finds every kind of broken package, and passes what is right."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from sagewan.attention import problems
from sagewan.attention.problems import LIMITS, TRIALS, trials_for
from sagewan.attention.self_test import examine, self_test
from sagewan.plan.catalogue import ROWS, Problem, row_named
from sagewan.plan.hardware import Device
from sagewan.plan.modes import MODES, Quality
from sagewan.reference.attention import attention
from tests.fakes import Install, on_cpu

CPU = Device(name="the CPU")
PROBLEM = Problem(head_dim=128, dtype="bfloat16")
PROBLEMS = pytest.mark.parametrize(
    "problem",
    [Problem(head_dim=d, dtype=dtype) for d in (16, 64, 128) for dtype in ("bfloat16", "float16")],
    ids=lambda problem: f"{problem.head_dim} {problem.dtype}",
)
SAGE = on_cpu("sageattention.sageattn_1", key_block=1, changes_key=False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trial of 200,000 keys, which takes seconds on a CPU."""
    monkeypatch.setattr(problems, "TRIALS", tuple(t for t in TRIALS if t.keys < 10_000))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("import error", "import-failed"),
        ("import exit", "import-failed"),
        ("function missing", "function-missing"),
        ("noise", "self-test-error"),
        ("slightly wrong", "self-test-error"),
        ("nan", "self-test-not-finite"),
        ("nan in one row", "self-test-not-finite"),
        ("changes key", "self-test-changed-inputs"),
        ("crash", "self-test-crashed"),
        ("wrong shape", "self-test-crashed"),
    ],
)
def test_each_kind_of_broken_package_is_found(
    install: Install, body: str, code: str, short: None
) -> None:
    install(SAGE, body)
    test = examine(SAGE, CPU, PROBLEM)
    assert test.objection is not None
    assert test.objection.code == code
    assert test.objection.sentence()
    assert test.milliseconds is None


def test_a_package_that_is_right_passes_with_its_numbers(install: Install, short: None) -> None:
    install(SAGE, "good")
    test = examine(SAGE, CPU, PROBLEM)
    assert test.passed
    assert test.error is not None
    assert 0.001 < test.error < 0.004, test.error  # 16-bit rounding of the output
    assert test.milliseconds is not None
    assert test.milliseconds > 0


def test_a_failure_beyond_160_000_keys_is_found(install: Install) -> None:
    install(SAGE, "long sequences")
    test = examine(SAGE, CPU, PROBLEM)
    assert test.objection is not None
    assert test.objection.code == "self-test-error"


def test_an_error_says_its_number_and_its_limit(install: Install, short: None) -> None:
    install(SAGE, "slightly wrong")
    test = examine(SAGE, CPU, PROBLEM)
    assert test.objection is not None
    assert test.error == pytest.approx(0.2, rel=0.02)
    assert "an error of 0.2, above the 0.035 of its class" in test.objection.sentence()


@pytest.mark.parametrize(
    ("body", "words"),
    [("abort", "was killed by SIGABRT"), ("import exit", "SystemExit: no GPU found")],
)
def test_a_package_that_ends_the_process_is_only_an_objection(
    install: Install, body: str, words: str
) -> None:
    install(SAGE, body)
    test = self_test(SAGE, CPU, PROBLEM)
    assert test.objection is not None
    assert words in test.objection.sentence()


def test_a_package_that_hangs_is_stopped(install: Install) -> None:
    install(SAGE, "hang")
    start = time.monotonic()
    test = self_test(SAGE, CPU, PROBLEM, timeout=8)
    assert time.monotonic() - start < 30
    assert test.objection is not None
    assert test.objection.code == "self-test-timeout"
    assert "no answer within 8 s" in test.objection.sentence()


@pytest.mark.parametrize("body", ["killed", "no memory of the CPU", "no memory of cuBLAS"])
def test_lack_of_memory_is_not_held_against_a_package(install: Install, body: str) -> None:
    install(SAGE, body)
    test = self_test(SAGE, CPU, PROBLEM)
    assert test.objection is not None
    assert test.objection.code == "self-test-no-memory"


@pytest.mark.parametrize(
    ("body", "other"),
    [
        ("wrong in float16", {"dtype": "float16"}),
        ("wrong at head size 64", {"head_dim": 64}),
    ],
)
def test_a_row_is_tested_in_the_head_size_and_dtype_it_will_run_in(
    install: Install, body: str, other: dict[str, Any]
) -> None:
    install(SAGE, body)
    assert self_test(SAGE, CPU, PROBLEM).passed
    assert not self_test(SAGE, CPU, replace(PROBLEM, **other)).passed


def test_a_result_comes_back_whole_from_another_process(install: Install) -> None:
    install(SAGE, "chatter")
    test = self_test(SAGE, CPU, PROBLEM)
    assert test.passed
    assert test.implementation == SAGE.name
    assert test.limit in LIMITS["bias"].values()


@PROBLEMS
def test_emulations_pass_the_limits_of_their_class_with_room(problem: Problem, short: None) -> None:
    share = 0.6 if problem.head_dim == 128 else 0.9
    for row in (row for row in ROWS if row.emulated and not row.sms):
        test = examine(row, CPU, problem)
        assert test.error is not None
        assert test.error < share * test.limit, f"{row.name}: {test.error} of {test.limit}"


@PROBLEMS
def test_limits_tell_the_classes_apart(problem: Problem, short: None) -> None:
    # FP4 arithmetic under a name that promises INT8 is a fault.
    coarse = row_named("emulated.sageattn_3_fp4")
    for mode in ("sdpa", "sageattn", "sageattn_3", "sageattn_3_fp8"):
        test = examine(on_cpu(coarse.name, mode=mode), CPU, problem)
        assert test.objection is not None, f"{mode}: {test.error} of {test.limit}"


def test_limits_grow_as_quality_falls() -> None:
    for family in LIMITS.values():
        assert set(family) == set(Quality)
        falling = [family[quality] for quality in sorted(Quality, reverse=True)]
        assert falling == sorted(falling)


def test_trials_respect_what_a_row_takes() -> None:
    blocked = on_cpu("sageattention.sageattn_1")
    assert blocked.key_block == 64
    assert all(trial.keys % 64 == 0 for trial in trials_for(blocked))
    assert any(trial.keys % 2 for trial in trials_for(SAGE))
    assert any(trial.queries != trial.keys for trial in trials_for(SAGE))
    grouped = [t.key_heads < t.heads for t in trials_for(on_cpu("sageattn3.blackwell"))]
    assert not any(grouped)


def test_inputs_are_the_same_each_time_and_k_is_biased() -> None:
    trial = TRIALS[0]
    first, second = (trial.inputs(PROBLEM, "cpu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert first[1].float().mean(2).abs().mean() > 1
    assert attention(*first).isfinite().all()


def test_every_mode_has_a_limit() -> None:
    assert {mode.quality for mode in MODES.values()} <= set(LIMITS["bias"])
