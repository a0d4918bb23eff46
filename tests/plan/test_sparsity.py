"""How much of attention is left out, before anything runs, and which rows can serve that."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagewan.errors import RequestError, UnsupportedError
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request
from sagewan.plan.serialize import plan_to_json
from sagewan.plan.sparsity import Sparsity, plan_sparsity
from sagewan.plan.speed import estimated_seconds
from tests.machines import DEMO, WAN_14B, machine

RADIAL = Sparsity.parse("radial:0.75")
HOPPER = machine("H100", triton="3.6.0", cuda_bindings="13.0.1")
grids = st.tuples(st.integers(1, 31), st.integers(1, 68), st.integers(1, 120))


def plan_of(**fields: object) -> Plan:
    wanted = {"prompt": "a red ball", "attention": "sageattn_3_fp8", "sparsity": RADIAL, **fields}
    return make_plan(Request(**wanted), WAN_14B, HOPPER, Evidence())  # type: ignore[arg-type]


@given(st.sampled_from(["radial", "sta"]), st.integers(1, 99), st.none() | st.integers(0, 50))
def test_it_is_read_as_it_is_written(kind: str, share: int, dense: int | None) -> None:
    sparsity = Sparsity(kind=kind, share=share / 100, dense=dense)
    assert Sparsity.parse(str(sparsity)) == sparsity


@given(grids, st.floats(0.01, 0.99), st.integers(1, 60))
def test_as_many_blocks_are_kept_as_the_share_says(
    grid: tuple[int, int, int], share: float, steps: int
) -> None:
    plan = plan_sparsity(Sparsity(kind="sta", share=share, dense=0), grid, steps)
    assert plan is not None
    assert 1 <= plan.kept <= plan.blocks
    assert abs(plan.skipped - share) <= 1 / plan.blocks
    of_all = plan.skipped_of_all(range(steps), 40)
    assert 0 <= of_all <= plan.skipped * 39 / 40 + 1e-9


def test_the_first_quarter_of_the_steps_and_the_first_layer_see_everything() -> None:
    plan = plan_of(steps=16).sparsity
    assert plan
    assert [plan.sparse_at(step) for step in range(16)] == [False] * 4 + [True] * 12
    assert plan.skipped_of_all(range(16), 40) == pytest.approx(plan.skipped * 12 / 16 * 39 / 40)
    chosen = plan_of(steps=16, sparsity=replace(RADIAL, dense=0)).sparsity
    assert chosen
    assert chosen.sparse_at(0)
    with pytest.raises(RequestError, match="every step, 4 in all, would be dense"):
        plan_of(steps=4, sparsity=replace(RADIAL, dense=4))


def test_only_rows_that_can_leave_out_blocks_serve() -> None:
    plan = plan_of()
    assert plan.attention.main.row.name == "sagewan.sageattn_3_fp8_hopper"
    flash = plan_of(attention="flash_attn")
    assert flash.attention.main.row.name == "sagewan.sdpa_blocks"
    assert flash.attention.fallbacks
    assert plan_of(attention="sdpa").attention.main.row.name == "sagewan.sdpa_blocks"
    assert plan_of(attention="sdpa", sparsity=None).attention.main.row.name == "torch.sdpa"
    with pytest.raises(UnsupportedError, match="flash_attn can't run here"):
        plan_of(attention="flash_attn", strict=True)


def test_a_package_that_knows_no_blocks_says_so() -> None:
    with_sage = machine("H100", sageattention="1.0.6")
    request = Request(prompt="a red ball", attention="sageattn", sparsity=RADIAL)
    plan = make_plan(request, WAN_14B, with_sage, Evidence())
    assert "can't leave out blocks of keys" in plan.attention.fallbacks[0].why()


def test_auto_takes_a_kernel_that_leaves_out_blocks_rather_than_gather_them() -> None:
    waiting = plan_of(attention="auto").attention
    ours = ["sagewan.sageattn_3_hopper", "sagewan.sageattn_3"]
    assert [row.name for row in waiting.unproven] == ours
    tests = [
        SelfTest(implementation=name, error=0.002, limit=0.015, milliseconds=9.0) for name in ours
    ]
    request = Request(prompt="a red ball", attention="auto", sparsity=RADIAL)
    evidence = Evidence().with_test(tests[0]).with_test(tests[1])
    proven = make_plan(request, WAN_14B, HOPPER, evidence)
    assert proven.attention.main.row.name == "sagewan.sageattn_3_hopper"
    on_cpu = make_plan(request, DEMO, machine(), Evidence())
    assert on_cpu.attention.main.row.name == "sagewan.sdpa_blocks"


def test_what_is_left_out_takes_no_time() -> None:
    dense, sparse = (estimated_seconds(plan_of(sparsity=x)) for x in (None, RADIAL))
    assert dense
    assert sparse
    assert 0.5 < sparse / dense < 0.8


def test_too_few_tokens_are_told() -> None:
    tiny = plan_of(size=(64, 64), frames=5)
    assert any("leaves out nothing" in note for note in tiny.notes)
    assert tiny.attention.main == plan_of(size=(64, 64), frames=5, sparsity=None).attention.main
    # Rows that take no mask are not objected to: there is none.
    flash = plan_of(size=(64, 64), frames=5, attention="sdpa").attention
    assert flash.main.row.name == "torch.sdpa"
    assert plan_of(attention="sdpa").attention.main.row.name != "torch.sdpa"
    sparsity = plan_to_json(plan_of(size=(1280, 720)))["sparsity"]
    assert (sparsity["blocks"], sparsity["kept"]) == (591, 148)
