"""A step by all contestants: checked first, and what is said to run is what ran."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sagewan.bench import contestants as field
from sagewan.bench import step
from sagewan.bench.case import TINY, case_of
from sagewan.bench.contestants import BASELINE, Contestant, Setting, contestants, random_inputs
from sagewan.bench.step import measure
from sagewan.model import block, matmul
from sagewan.pipeline.probe import probe
from sagewan.plan.speed import RATES


@pytest.fixture(scope="module")
def setting() -> Setting:
    hardware = probe()
    case = case_of(TINY, "64x64", 9)
    return Setting(case=case, device=hardware.cpu, hardware=hardware, emulate=True)


def chosen(
    setting: Setting, quantizations: Sequence[str], modes: Sequence[str]
) -> list[Contestant]:
    return contestants(setting, (), quantizations, modes)[0]


def test_ours_differs_by_what_its_formats_cost(setting: Setting) -> None:
    found = measure(
        setting,
        chosen(setting, ("none", "fp8_scaled", "fp4_scaled"), ("sdpa", "sageattn_3_fp4")),
        rounds=1,
    )
    assert [one.wrong for one in found] == [None] * 7
    errors = {(one.weights, one.attention): one.error or 0 for one in found[1:]}
    exact, coarse = "torch.sdpa", "emulated.sageattn_3_fp4"
    assert errors["none", exact] < 1e-6, "the same arithmetic"
    assert 0.01 < errors["fp8_scaled", exact] < errors["fp4_scaled", exact]
    for weights in ("none", "fp8_scaled", "fp4_scaled"):
        assert errors[weights, exact] < errors[weights, coarse]
    assert found[0].name == BASELINE
    sizes = {one.weights: one.block_bytes for one in found}
    assert sizes["fp4_scaled"] < sizes["fp8_scaled"] < sizes["none"]


def test_a_step_is_all_layers_and_the_ends_twice(setting: Setting) -> None:
    (found,) = measure(setting, chosen(setting, (), ()), rounds=2)
    assert found.layer_ms is not None
    assert found.ends_ms is not None
    wanted = 2 * (TINY.layers * found.layer_ms + found.ends_ms) / 1000
    assert found.step_seconds == pytest.approx(wanted)


def test_what_is_named_is_what_multiplies(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = matmul.emulated_fp8

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments[0].shape)
        return real(*arguments)

    monkeypatch.setattr(matmul, "emulated_fp8", counted)
    one = chosen(setting, ("fp8_scaled",), ("sdpa",))[-1]
    assert one.products == "fp8 e4m3 × fp8 e4m3"
    one.predict(random_inputs(setting.case, setting.device))
    assert len(calls) == 8, "all of a block's matrices but the text's keys and values"


def test_the_texts_keys_are_those_of_the_first_pass_and_timed_apart(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "rate_of", lambda _: RATES["h100"])
    computed = []
    real = block.text_keys

    def counted(*arguments: Any) -> Any:
        computed.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(block, "text_keys", counted)
    baseline, ours = measure(setting, chosen(setting, ("none",), ("sdpa",)), rounds=3)
    assert len(computed) == 1
    assert baseline.text_ms is None
    assert (ours.text_ms or 0) > 0
    # Both of 16 bit: the least time, too, is without them.
    assert (ours.floor_ms or 0) < (baseline.floor_ms or 0)


def test_one_that_is_wrong_or_fails_is_not_timed(setting: Setting) -> None:
    baseline, ours = chosen(setting, ("none",), ("sdpa",))
    wrong = replace(ours, name="wrong", model=field.shared_copy(baseline.model))
    wrong.model.proj_out = torch.nn.Linear(256, 64, dtype=torch.bfloat16)
    broken = replace(ours, name="broken", model=_Failing(baseline.model))
    found = {one.name: one for one in measure(setting, [baseline, wrong, broken], rounds=1)}
    assert "error above" in (found["wrong"].wrong or "")
    assert found["wrong"].layer_ms is None
    assert found["broken"].wrong == "ValueError: no such kernel"
    assert found[BASELINE].wrong is None


def test_nothing_is_called_right_where_the_baseline_fails(setting: Setting) -> None:
    baseline, ours = chosen(setting, ("none",), ("sdpa",))
    broken = replace(baseline, model=_Failing(baseline.model))
    failed, unchecked = measure(setting, [broken, ours], rounds=1)
    assert failed.wrong
    assert unchecked.error is None
    assert unchecked.layer_ms is not None


class _Failing(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.blocks = model.blocks

    def forward(self, **_: object) -> None:
        raise ValueError("no such kernel")


def test_what_can_not_run_here_is_told(setting: Setting) -> None:
    found, refused = contestants(replace(setting, emulate=False), (), ("none",), ("sageattn",))
    assert [one.name for one in found] == [BASELINE]
    assert "needs an NVIDIA GPU" in refused["sageattn"]
