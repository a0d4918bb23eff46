"""The loop from a request to a plan in which nothing is left to prove."""

import pytest

from sagewan.attention import cache, self_test
from sagewan.errors import RequestError, UnsupportedError
from sagewan.pipeline.decide import blame, decide, not_finite
from sagewan.plan import attention, catalogue
from sagewan.plan.catalogue import ROWS, Implementation, Problem
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.objection import Objection
from sagewan.plan.request import Ends, Request
from tests.machines import WAN_14B, machine

NOISE = Objection("self-test-error", {"error": "0.9", "limit": "0.02"})


class Bench:
    """Stands in for the self-test: remembers what was tried, and says what it was told to."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.stored: list[str] = []
        self.problems: set[tuple[int, str]] = set()
        self.failing: set[str] = set()

    def self_test(self, row: Implementation, device: Device, problem: Problem) -> SelfTest:
        self.tried.append(row.name)
        self.problems.add((problem.head_dim, problem.dtype))
        failed = row.name in self.failing
        return SelfTest(
            implementation=row.name,
            error=0.9 if failed else 0.01,
            limit=0.02,
            milliseconds=float(len(self.tried)),
            objection=NOISE if failed else None,
        )

    def store(self, test: SelfTest, device: Device, hardware: Hardware, problem: Problem) -> None:
        self.stored.append(test.implementation)
        self.problems.add((problem.head_dim, problem.dtype))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Two made-up rows of sageattn, one of sageattn_3, and torch's own."""
    made_up = tuple(
        Implementation(name=name, mode=mode, call="x:x", qk="int8", pv="fp16")
        for name, mode in (("first", "sageattn"), ("second", "sageattn"), ("third", "sageattn_3"))
    )
    torch_row = next(row for row in ROWS if row.name == "torch.sdpa")
    monkeypatch.setattr(catalogue, "ROWS", (*made_up, torch_row))
    result = Bench()
    monkeypatch.setattr(self_test, "self_test", result.self_test)
    monkeypatch.setattr(cache, "store", result.store)
    return result


def ask(mode: str | None, **fields: object) -> Request:
    return Request(prompt="a cat", attention=mode, **fields)  # type: ignore[arg-type]


HARDWARE = machine("H100")


def test_a_trusted_row_needs_no_test(bench: Bench) -> None:
    decision = decide(ask("sdpa"), WAN_14B, HARDWARE)
    assert decision.plan.attention.main.row.name == "torch.sdpa"
    assert bench.tried == []


def test_a_row_is_tested_once_and_stored(bench: Bench) -> None:
    decision = decide(ask("sageattn"), WAN_14B, HARDWARE)
    assert bench.tried == bench.stored == ["first"]
    assert decision.plan.attention.main.row.name == "first"
    assert decision.plan.attention.unproven == ()
    again = decide(ask("sageattn"), WAN_14B, HARDWARE, evidence=decision.evidence)
    assert bench.tried == ["first"]
    assert again.plan == decision.plan


def test_a_failed_test_makes_the_plan_again_until_something_stands(bench: Bench) -> None:
    bench.failing = {"third", "first"}
    plan = decide(ask("sageattn_3"), WAN_14B, HARDWARE).plan
    assert bench.tried == ["third", "first", "second"]
    assert plan.attention.main.row.name == "second"
    assert "0.9" in plan.attention.fallbacks[0].why()


def test_strict_refuses_after_the_failed_test(bench: Bench) -> None:
    bench.failing = {"third"}
    with pytest.raises(UnsupportedError, match=r"sageattn_3 can't run here.*0\.9"):
        decide(ask("sageattn_3", strict=True), WAN_14B, HARDWARE)


def test_auto_tests_all_that_are_good_enough_and_takes_the_fastest(bench: Bench) -> None:
    plan = decide(ask("auto"), WAN_14B, HARDWARE).plan
    # torch's own row is timed as well; sageattn is below the quality that auto promises.
    assert set(bench.tried) == {"torch.sdpa", "third"}
    assert plan.attention.main.row.name == bench.tried[0], "the made-up times grow"


def test_a_wrong_request_is_refused_before_any_test(bench: Bench) -> None:
    with pytest.raises(RequestError):
        decide(ask("sageattn", frames=5, size=(17, 16), cfg_2=1.0), WAN_14B, HARDWARE)
    assert bench.tried == []


def test_stored_evidence_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Evidence().with_test(
        SelfTest(implementation="first", error=0.01, limit=0.02, milliseconds=1.0)
    )
    asked: list[Problem] = []
    monkeypatch.setattr(
        cache, "load_evidence", lambda device, hardware, problem: asked.append(problem) or known
    )
    request = ask("sageattn", dtype="float16")
    assert decide(request, WAN_14B, HARDWARE).plan.attention.main.row.name == "first"
    assert bench.tried == []
    assert [(problem.head_dim, problem.dtype) for problem in asked] == [(128, "float16")]


def test_a_row_is_proved_in_the_dtype_of_the_run(bench: Bench) -> None:
    decide(ask("sageattn", dtype="float16"), WAN_14B, HARDWARE)
    assert bench.problems == {(128, "float16")}


def test_what_fails_later_is_left_out_from_then_on(bench: Bench) -> None:
    decision = decide(ask("sageattn_3"), WAN_14B, HARDWARE)
    later = decision.after({"third": Objection("run-failed", {"error": "boom"})})
    assert later.plan.attention.main.row.name == "first"
    assert later.after({}).plan == later.plan


@pytest.mark.parametrize(("step", "blamed"), [(0, "third"), (5, "first"), (39, "third")])
def test_the_blame_falls_on_what_ran_at_that_step(bench: Bench, step: int, blamed: str) -> None:
    ends = Ends(mode="sageattn_3", first=2, last=1)
    request = ask("sageattn", attention_ends=ends, steps=40)
    row = blame(decide(request, WAN_14B, HARDWARE).plan, step)
    assert row is not None
    assert row.name == blamed


def test_exact_attention_is_not_to_blame(bench: Bench) -> None:
    assert blame(decide(ask("sdpa"), WAN_14B, HARDWARE).plan, 3) is None


def test_nan_speaks_against_the_whole_mode_and_all_that_are_no_more_precise() -> None:
    row = catalogue.row_named("emulated.sageattn_3")
    objections = not_finite(row, 2)
    modes = {name: catalogue.row_named(name).mode for name in objections}
    assert set(modes.values()) == {"sageattn_3", "sageattn_3_fp8", "sageattn_3_fp4", "sageattn"}
    assert objections["emulated.sageattn_3"].sentence().endswith("at step 3")
    assert "no more precise than sageattn_3" in objections["emulated.sageattn"].sentence()
    assert attention.MODES["flash_attn"].name not in modes.values()


@pytest.mark.parametrize(
    ("row", "left"),
    [
        # Of the same class, and so no better: sageattn_3_fp8 beside sageattn.
        ("sagewan.sageattn", {"sageattn_3", "flash_attn", "sdpa"}),
        ("sagewan.sageattn_3_fp8", {"sageattn_3", "flash_attn", "sdpa"}),
        ("flash_attn", {"sdpa"}),
    ],
)
def test_after_nan_only_a_more_precise_mode_is_left(row: str, left: set[str]) -> None:
    objections = not_finite(catalogue.row_named(row), 0)
    assert {other.mode for other in ROWS if other.name not in objections} == left
