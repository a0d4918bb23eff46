"""What rows promise about their functions, and the lengths at which padding would show."""

import pytest

from sagewan.plan.attention import plan_attention
from sagewan.plan.catalogue import MAX_PADDING_SHARE, ROWS, Problem, row_named
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.models import PUBLISHED
from sagewan.plan.request import Request
from tests.machines import machine

SAGE_1 = row_named("sageattention.sageattn_1")
HARDWARE = machine("H100", sageattention="1.0.6", torch="2.13.0")


@pytest.mark.parametrize(("keys", "padding"), [(64, 0), (320, 0), (333, 51), (32_760, 8)])
def test_padding_taken_for_keys_gets_at_most_its_share(keys: int, padding: int) -> None:
    assert SAGE_1.padding_share(keys) == pytest.approx(padding / (keys + padding))
    assert row_named("torch.sdpa").padding_share(keys) == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_own_sizes_are_long_enough_for_padding(name: str) -> None:
    model = PUBLISHED[name]
    width, height = model.sampling.size
    across, down = model.grid
    size = (-(-width // across) * across, -(-height // down) * down)
    assert SAGE_1.padding_share(model.tokens(size, model.sampling.frames)) < MAX_PADDING_SHARE


def test_a_length_at_which_padding_shows_is_an_objection_and_falls_back() -> None:
    short = Problem(head_dim=128, dtype="bfloat16", keys=333)
    plan = plan_attention(
        Request(prompt="x", attention="sageattn"),
        None,
        short,
        HARDWARE.devices[0],
        HARDWARE,
        Evidence(),
        layers=1,
    )
    assert plan.main.mode == "sdpa"
    assert "its last block of 64 keys" in plan.fallbacks[0].why()
    assert "333" in plan.fallbacks[0].why()


def test_auto_times_torch_as_well_where_it_has_a_rival() -> None:
    hardware = machine("H100", flash_attn_4="4.0.0b36")
    evidence = Evidence()

    def unproven() -> set[str]:
        plan = plan_attention(
            Request(prompt="x", attention="auto"),
            None,
            Problem(head_dim=128, dtype="bfloat16"),
            hardware.devices[0],
            hardware,
            evidence,
            layers=1,
        )
        chosen.append(plan.main.row.name)
        return {row.name for row in plan.unproven}

    chosen: list[str] = []
    assert unproven() == {"torch.sdpa", "flash_attn.cute"}
    for name, time in (("torch.sdpa", 1.0), ("flash_attn.cute", 2.0)):
        evidence = evidence.with_test(
            SelfTest(implementation=name, error=0.002, limit=0.01, milliseconds=time)
        )
    assert unproven() == set()
    assert chosen[-1] == "torch.sdpa", "a slower row must not win because only it was timed"


def test_rows_that_return_a_log_sum_exp_say_how() -> None:
    for row in ROWS:
        assert row.log_sum_exp or row.lse_option is None, row.name
        assert row.grouped_heads or row.grouped_option is None, row.name
        assert row.package is None or row.install, row.name
