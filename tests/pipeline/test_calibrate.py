"""A model is measured once; then its blocks are left out where the plan says so."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.find import find_model
from sagewan.errors import RejectedError, RequestError
from sagewan.pipeline import generate, magnitudes
from sagewan.pipeline.calibrate import calibrate
from sagewan.pipeline.decide import decide
from sagewan.pipeline.denoise import NotFinite, denoise, start
from sagewan.pipeline.export import read_settings
from sagewan.pipeline.magnitudes import load_magnitudes, store_magnitudes
from sagewan.pipeline.probe import probe
from sagewan.pipeline.progress import Watch
from sagewan.plan.noise import expert_at
from sagewan.plan.request import Request
from sagewan.plan.serialize import settings_from_json
from sagewan.plan.step_cache import StepCache, plan_cache
from tests.pipeline.runs import difference, latents_of, plan_for
from tests.pipeline.test_denoise import Spoiling, conditioned

Folder = Callable[[str], Path]
T2V, A14B = "wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"
MAG = StepCache.parse("mag:0.5")
SMALL: dict[str, Any] = {"size": (64, 64), "frames": 5, "steps": 8, "seed": 2}


def test_without_measurements_it_is_refused_with_the_command_and_with_them_it_runs(
    tmp_path: Path,
) -> None:
    request = Request(prompt="a red ball", output=tmp_path / "a.mp4", cache=MAG, **SMALL)
    with pytest.raises(RequestError, match=r"sagewan calibrate --model demo --steps 8 --shift 3"):
        generate(request)
    found = calibrate(request, Watch())
    assert found.magnitudes[0] is None
    assert len(found.magnitudes) == 8
    assert all(0.3 < x < 3 for x in found.magnitudes[1:] if x is not None)
    result = generate(request)
    facts = result.report["cache"]
    assert facts["steps"] == [step + 1 for step in found.reused]
    assert facts["reused"] == 2 * len(found.reused) > 0
    assert sum(row["calls"] for row in result.report["attention"]["ran"]) == 8 * (
        16 - facts["reused"]
    )
    with pytest.raises(RequestError, match="--steps 9"):
        generate(replace(request, steps=9))
    # Measured anew, by another prompt or machine: made again from itself it is the same video.
    store_magnitudes(result.plan, (None, *[9.0] * 7))
    again = settings_from_json(read_settings(result.path))
    second = generate(Request(**again, output=tmp_path / "b.mp4"))
    assert second.report["cache"]["steps"] == facts["steps"]
    assert second.report["output"]["sha256"] == result.report["output"]["sha256"]


def test_what_is_told_to_measure_is_what_is_missing(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**SMALL, "steps": 4, "scheduler": "euler", "shift": 2.123456789}
    request = Request(prompt="a red ball", output=tmp_path / "a.mp4", cache=MAG, **fields)
    with pytest.raises(RequestError) as refused:
        decide(request, find_model("demo"), probe())
    words = shlex.split(str(refused.value).partition("sagewan calibrate ")[2])
    told = dict(zip(words[::2], words[1::2], strict=False))
    assert (told["--scheduler"], float(told["--shift"])) == ("euler", 2.123456789)


def test_what_breaks_off_measuring_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagewan.attention.launch.Launcher", lambda: Spoiling(3))
    with pytest.raises(RejectedError, match=r"stopped being finite at step 1 of 8"):
        calibrate(Request(prompt="a red ball", attention="sdpa", **SMALL), Watch())


def test_measuring_changes_nothing_and_each_expert_begins_anew(shrunken_folder: Folder) -> None:
    request = Request(
        prompt="a cat", model=str(shrunken_folder(A14B)), attention="sdpa", shift=5.0, cfg=2.0,
        **SMALL,
    )  # fmt: skip
    found = calibrate(request, Watch())
    times = start(found.plan).sampler.times
    experts = [expert_at(float(time), found.plan.steps.boundary) for time in times]
    switch = experts.index(1)
    assert 0 < switch < 8
    assert [i for i, x in enumerate(found.magnitudes) if x is None] == [0, switch]
    assert load_magnitudes(found.plan) == found.magnitudes
    assert load_magnitudes(replace(found.plan, steps=replace(found.plan.steps, shift=4.0))) is None


def test_blocks_are_left_out_where_the_plan_says_and_nowhere_else(shrunken_folder: Folder) -> None:
    plain = plan_for(shrunken_folder(T2V), steps=8)
    never = replace(plain, cache=plan_cache(MAG, [2] * 8, (None, *[9.0] * 7)))
    launcher = Launcher()
    assert torch.equal(latents_of(never, launcher), latents_of(plain))
    assert launcher.calls == 2 * 16
    plan = replace(plain, cache=plan_cache(MAG, [2] * 8, (None, *[1.0] * 7)))
    assert plan.cache
    assert plan.cache.reused == (2, 3, 5, 6)
    components, conditions = conditioned(plan, launcher := Launcher())
    latents = denoise(components, plan, conditions, Watch())
    assert components.forwards.steps() == (3, 4, 6, 7)
    assert launcher.calls == 2 * (16 - 8)
    assert 0 < difference(latents, latents_of(plain)) < 1


def test_after_a_failure_what_is_not_kept_is_computed(shrunken_folder: Folder) -> None:
    plan = plan_for(shrunken_folder(T2V), steps=8)
    plan = replace(plan, cache=plan_cache(MAG, [2] * 8, (None, *[1.0] * 7)))
    # In step 5, between steps 3 and 4, which are reused, and 6 and 7.
    broken, conditions = conditioned(plan, Spoiling(2 * 2 * 2 + 1))
    with pytest.raises(NotFinite) as failure:
        denoise(broken, plan, conditions, Watch())
    assert failure.value.step == 4
    sound, conditions = conditioned(plan, Launcher())
    resumed = denoise(sound, plan, conditions, Watch(), resume=failure.value.snapshot)
    assert resumed.isfinite().all()
    assert sound.forwards.steps() == (6, 7)


def test_of_two_measurements_at_once_both_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt="a red ball", cache=MAG, **SMALL)
    plans = [
        decide(replace(request, steps=steps), find_model("demo"), probe(), calibrating=True).plan
        for steps in (8, 9)
    ]
    whole = magnitudes.write_whole

    def late(path: Path, data: bytes) -> None:
        """The other run writes between what this one has read and what it writes."""
        monkeypatch.setattr(magnitudes, "write_whole", whole)
        store_magnitudes(plans[1], (None, *[2.0] * 8))
        whole(path, data)

    monkeypatch.setattr(magnitudes, "write_whole", late)
    store_magnitudes(plans[0], (None, *[1.0] * 7))
    assert load_magnitudes(plans[0]) == (None, *[1.0] * 7)
    assert load_magnitudes(plans[1]) == (None, *[2.0] * 8)
