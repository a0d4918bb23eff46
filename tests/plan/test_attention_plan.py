"""Which row is chosen, what it falls back to, and the sentence that says why."""

import itertools

import pytest

from sagewan.errors import RequestError, UnsupportedError
from sagewan.plan.attention import AttentionPlan, plan_attention
from sagewan.plan.catalogue import ROWS, Problem, row_named, rows_of
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.hardware import Hardware
from sagewan.plan.modes import MODES, PRESETS, fallback_chain
from sagewan.plan.objection import Objection
from sagewan.plan.request import Ends, Request
from tests.machines import machine

PROBLEM = Problem(head_dim=128, dtype="bfloat16")
SAGE_1 = "sageattention.sageattn_1"


def passed(name: str, milliseconds: float = 1.0) -> SelfTest:
    return SelfTest(implementation=name, error=0.002, limit=0.02, milliseconds=milliseconds)


def decide(
    hardware: Hardware, evidence: Evidence | None = None, *, preset: str | None = None, **fields
) -> AttentionPlan:
    request = Request(prompt="x", preset=preset, **fields)
    return plan_attention(
        request,
        PRESETS[preset] if preset else None,
        PROBLEM,
        hardware.device("auto"),
        hardware,
        evidence or Evidence(),
        layers=40,
    )


@pytest.mark.parametrize(
    ("mode", "chain"),
    [
        ("sageattn_3_fp4", ("sageattn_3_fp4", "sageattn_3", "sageattn", "sdpa")),
        ("sageattn_3_fp8", ("sageattn_3_fp8", "sageattn_3", "sageattn", "sdpa")),
        ("sageattn_3", ("sageattn_3", "sageattn", "sdpa")),
        ("sageattn", ("sageattn", "sdpa")),
        ("flash_attn", ("flash_attn", "sdpa")),
        ("sdpa", ("sdpa",)),
    ],
)
def test_the_chains_are_those_promised(mode: str, chain: tuple[str, ...]) -> None:
    assert fallback_chain(mode) == chain


def test_fp4_on_hopper_falls_back_with_the_compute_capability_in_the_sentence() -> None:
    plan = decide(machine("H100"), attention="sageattn_3_fp4")
    assert plan.main.mode == "sdpa"
    first = plan.fallbacks[0]
    assert (first.from_mode, first.to_mode) == ("sageattn_3_fp4", "sageattn_3")
    assert first.why() == (
        "needs compute capability 10.0 or newer (Blackwell), and NVIDIA H100 has 9.0"
    )


def test_strict_refuses_the_first_step_down() -> None:
    with pytest.raises(UnsupportedError, match=r"sageattn_3_fp4 can't run here.*has 9\.0"):
        decide(machine("H100"), attention="sageattn_3_fp4", strict=True)


def test_a_preset_resolves_to_what_the_card_can_do_even_under_strict() -> None:
    plan = decide(machine("H100"), preset="low-vram", strict=True)
    assert plan.requested == "sageattn_3_fp4"
    assert plan.main.mode == "sdpa"
    assert plan.from_preset
    assert not decide(machine("H100")).from_preset, "nothing was asked for, by a preset or by name"


@pytest.mark.parametrize("card", ["3080", "4090", "H100", "5090"])
def test_sageattn_runs_wherever_its_package_is(card: str) -> None:
    plan = decide(machine(card, sageattention="1.0.6"), attention="sageattn")
    assert plan.main.row.name == SAGE_1
    assert not plan.fallbacks
    assert [row.name for row in plan.unproven] == [SAGE_1]


def test_a_failed_self_test_is_an_objection_with_its_numbers() -> None:
    noise = SelfTest(
        implementation=SAGE_1,
        error=1.4,
        limit=0.02,
        milliseconds=None,
        objection=Objection("self-test-error", {"error": "1.4", "limit": "0.02"}),
    )
    plan = decide(
        machine("H100", sageattention="1.0.6"), Evidence().with_test(noise), attention="sageattn"
    )
    assert plan.main.mode == "sdpa"
    assert "self-test gave an error of 1.4" in plan.fallbacks[0].why()
    assert not plan.unproven


def test_a_failure_while_running_outweighs_a_passed_self_test() -> None:
    evidence = (
        Evidence()
        .with_test(passed(SAGE_1))
        .with_failure(SAGE_1, Objection("run-not-finite", {"step": "3"}))
    )
    plan = decide(machine("H100", sageattention="1.0.6"), evidence, attention="sageattn")
    assert plan.main.mode == "sdpa"
    assert "stopped being finite at step 3" in plan.fallbacks[0].why()


def test_auto_takes_the_fastest_that_passed_within_the_quality_asked_for() -> None:
    hardware = machine("H100", sageattention="1.0.6", flash_attn="2.8.3")
    names = (SAGE_1, "flash_attn", "torch.sdpa")
    evidence = Evidence({name: passed(name, ms) for name, ms in zip(names, (1, 2, 3), strict=True)})
    assert decide(hardware, evidence).main.row.name == "flash_attn"
    assert decide(hardware, evidence, preset="balanced", attention="auto").main.row.name == SAGE_1


def test_auto_waits_for_every_candidate_it_has_not_timed() -> None:
    hardware = machine("H100", flash_attn="2.8.3")
    plan = decide(hardware)
    assert plan.main.mode == "sdpa"
    assert "flash_attn" in {row.name for row in plan.unproven}
    # Nothing stays unproven once each has a result, so asking again comes to an end.
    evidence = Evidence({row.name: passed(row.name) for row in plan.unproven})
    assert not decide(hardware, evidence).unproven


def test_emulation_serves_a_mode_only_where_it_is_allowed() -> None:
    assert decide(machine(), attention="sageattn_3_fp4").main.mode == "sdpa"
    plan = decide(machine(), attention="sageattn_3_fp4", emulate=True)
    assert plan.main.row.name == "emulated.sageattn_3_fp4"
    assert plan.main.row.emulated


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.pv != "16 bit"])
def test_every_quantised_mode_has_an_emulation(mode: str) -> None:
    assert any(row.emulated for row in rows_of(mode, emulate=True))


def test_a_schedule_uses_the_other_mode_at_its_ends_and_kept_layers() -> None:
    plan = decide(
        machine(),
        attention="sageattn_3_fp4",
        attention_ends=Ends(mode="sdpa", first=2, last=1),
        attention_keep_layers=(0, 39),
        emulate=True,
    )
    chosen = {
        (step, layer): plan.choice(step, 10, layer).mode
        for step, layer in itertools.product(range(10), (0, 5, 39))
    }
    for (step, layer), mode in chosen.items():
        exact = step in {0, 1, 9} or layer in {0, 39}
        assert mode == ("sdpa" if exact else "sageattn_3_fp4"), (step, layer)


def test_the_rows_of_both_choices_are_proved() -> None:
    hardware = machine("H100", sageattention="1.0.6", flash_attn="2.8.3")
    ends = Ends(mode="sageattn", first=1, last=1)
    for attention in ("flash_attn", "auto"):
        plan = decide(hardware, attention=attention, attention_ends=ends)
        assert {"flash_attn", SAGE_1} <= {row.name for row in plan.unproven}, attention
        assert plan.problem == PROBLEM


def test_a_layer_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(RequestError, match="0 to 39, not 40"):
        decide(
            machine(),
            attention="sdpa",
            attention_ends=Ends(mode="sdpa", first=0, last=0),
            attention_keep_layers=(40,),
        )


def test_rows_are_called_by_names_that_are_theirs_alone() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row_named(row.name) is row for row in ROWS)


@pytest.mark.parametrize(
    ("version", "code"),
    [("1.0.6", None), ("1.0.5", "package-version"), ("2.2.0", "package-version")],
)
def test_versions_are_a_half_open_range(version: str, code: str | None) -> None:
    hardware = machine("H100", sageattention=version)
    objection = row_named(SAGE_1).objection(PROBLEM, hardware.device("auto"), hardware)
    assert (objection.code if objection else None) == code


def test_every_objection_has_a_sentence_that_its_row_can_fill() -> None:
    for row, card in itertools.product(ROWS, ("3080", "H100", None)):
        hardware = machine(card) if card else machine()
        problem = Problem(head_dim=72, dtype="float32", grouped_heads=True, log_sum_exp=True)
        for objection in row.objections(problem, hardware.device("auto"), hardware):
            assert "{" not in objection.sentence()
