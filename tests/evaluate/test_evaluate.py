"""Whole evaluations, tiny: what ran is told, worse is found worse, a stopped one goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sagewan.checkpoint.find import find_model
from sagewan.errors import Cancelled, RequestError
from sagewan.evaluate.run import Evaluation, evaluate
from sagewan.pipeline.progress import Event, Watch
from sagewan.plan.request import Request
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache
from sagewan.reference import emulation

SMALL = {"size": (64, 64), "frames": 5, "steps": 2, "seed": 3, "emulate": True}


def settings(folder: Path, *modes: str, **changes: object) -> Evaluation:
    request = Request(prompt="evaluate", **SMALL | changes)  # type: ignore[arg-type]
    return Evaluation(
        request=request, attention=modes, quantization=("none",), folder=folder, count=3, batch=2
    )


def test_the_table_says_what_ran_and_what_it_costs(tmp_path: Path) -> None:
    found = evaluate(settings(tmp_path, "sageattn_3", "sageattn_3_fp4", "flash_attn"))
    exact, fine, coarse, same = found.entries
    assert exact["name"] == "sdpa"
    assert "sageattn_3 (emulated.sageattn_3, emulated)" in found.table
    assert all("emulated" in told for told in coarse["ran"])
    assert same["same_as"] == "sdpa"
    assert "flash_attn gave way to sdpa: needs an NVIDIA GPU" in found.table
    assert coarse["dit"]["low"] > 2 * fine["dit"]["high"] > 0
    assert coarse["psnr"]["value"] < fine["psnr"]["value"] < 100
    assert coarse["ssim"]["value"] < fine["ssim"]["value"] < 1
    assert (
        exact["right"]["count"] + coarse["change"]["gained"] - coarse["change"]["lost"]
        == (coarse["right"]["count"])
    )
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["cells"] == json.loads(json.dumps(found.entries))
    assert kept["settings"]["plan"]["steps"] == 2
    ElementTree.fromstring((tmp_path / "table.svg").read_text())
    lines = (tmp_path / "clips.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3


def test_a_step_cache_is_one_more_axis_and_what_it_reuses_is_told(tmp_path: Path) -> None:
    cache = StepCache.parse("easy:1")
    wanted = settings(tmp_path, "sdpa", steps=6)
    found = evaluate(replace(wanted, cache=(None, cache)))
    exact, cached = found.entries
    assert (exact["cache"], cached["cache"]) == (None, "easy:1")
    assert cached["name"] == "sdpa, easy:1"
    assert 0 < cached["reused"]["value"] <= 0.5
    assert f"{cached['reused']['value']:.0%} of the passes reused" in found.table
    # The weights are the same, so that one forward pass loses nothing.
    assert cached["dit"]["value"] == 0
    assert 10 < cached["psnr"]["value"] < 100
    # Together or one by one: each clip is reused as often, and looks the same.
    alone = evaluate(replace(wanted, cache=(None, cache), folder=tmp_path / "alone", batch=1))
    assert alone.entries[1]["reused"] == cached["reused"]
    assert alone.entries[1]["psnr"]["value"] == pytest.approx(cached["psnr"]["value"], abs=0.5)


def test_sparsity_is_one_more_axis_and_what_it_leaves_out_is_told(tmp_path: Path) -> None:
    # 5 × 6 × 6 tokens: two blocks.
    wanted = settings(tmp_path, "sdpa", size=(192, 192), frames=17)
    sparsity = (None, Sparsity.parse("radial:0.5,0"))
    found = evaluate(replace(wanted, sparsity=sparsity, count=1))
    exact, sparse = found.entries
    assert sparse["name"] == "sdpa, radial:0.5,0"
    assert sparse["skipped"]["value"] == pytest.approx(1 / 2 * 7 / 8)
    assert "44% of the blocks of keys left out" in found.table
    assert sparse["dit"]["value"] > 0
    assert exact["sparsity"] is None


def test_an_evaluation_that_compares_nothing_says_what_would(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = settings(tmp_path / "plain", "sdpa", "sageattn", emulate=False)
    evaluate(replace(plain, count=1))
    assert "nothing is compared: all that was asked for runs as sdpa here" in caplog.text
    caplog.clear()
    evaluate(replace(settings(tmp_path / "emulated", "sageattn"), count=1))
    assert "nothing is compared" not in caplog.text


def test_a_planted_fault_is_found_and_goes_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated: Callable[..., torch.Tensor] = emulation.sageattn_3

    def spoilt(q: torch.Tensor, *others: torch.Tensor, **options: object) -> torch.Tensor:
        out = emulated(q, *others, **options)
        return out + 0.2 * out.flip(-2)

    good = evaluate(settings(tmp_path / "good", "sageattn_3"))
    monkeypatch.setattr(emulation, "sageattn_3", spoilt)
    monkeypatch.setattr("sagewan.evaluate.cells.decide", _without_self_tests())
    bad = evaluate(settings(tmp_path / "bad", "sageattn_3"))
    assert bad.entries[1]["dit"]["low"] > 3 * good.entries[1]["dit"]["high"]
    assert bad.entries[1]["psnr"]["high"] < good.entries[1]["psnr"]["low"]
    assert "spoilt" in bad.table
    assert "emulated.sageattn_3" not in bad.table


def _without_self_tests() -> Callable[..., object]:
    """A decision that takes every row on trust: the fault is to reach the table."""
    from sagewan.pipeline.decide import Decision
    from sagewan.plan.evidence import Evidence
    from sagewan.plan.plan import make_plan

    def decide(request, model, hardware, loras, watch):  # type: ignore[no-untyped-def]
        plan = make_plan(request, model, hardware, Evidence(), loras)
        return Decision(
            request=request, model=model, hardware=hardware, evidence=Evidence(), plan=plan
        )

    return decide


def test_an_evaluation_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(settings(tmp_path / "whole", "sageattn"))

    def stop(event: Event) -> None:
        if event.stage == "evaluate" and event.done == 2:
            watch.cancel()

    watch = Watch(stop)
    with pytest.raises(Cancelled):
        evaluate(settings(tmp_path / "parts", "sageattn"), watch=watch)
    assert not (tmp_path / "parts" / "table.md").exists()
    done: list[int] = []
    rest = evaluate(
        settings(tmp_path / "parts", "sageattn"), watch=Watch(lambda e: done.append(e.done))
    )
    assert set(done) == {0, 3}
    for entries in (rest.entries, whole.entries):
        for entry in entries:
            entry.pop("seconds")
    assert rest.entries == whole.entries
    with pytest.raises(RequestError, match="other settings"):
        evaluate(settings(tmp_path / "parts", "sageattn", steps=3))
    # Rounded by other measurements, quantised weights are others.
    monkeypatch.setattr(
        "sagewan.evaluate.run.find_model", lambda name: replace(find_model(name), measured={})
    )
    with pytest.raises(RequestError, match="other settings"):
        evaluate(settings(tmp_path / "parts", "sageattn"))


def test_prompts_of_a_file_are_compared_without_a_score(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball grows\n\na blue star moves up\n", encoding="utf-8")
    evaluation = Evaluation(
        request=Request(prompt="x", **SMALL),  # type: ignore[arg-type]
        attention=("sageattn_3_fp4",),
        quantization=("none", "fp8_scaled"),
        folder=tmp_path / "out",
        prompts=prompts,
    )
    found = evaluate(evaluation)
    assert [entry["name"] for entry in found.entries] == [
        "sdpa",
        "sageattn_3_fp4",
        "sageattn_3_fp4, fp8_scaled",
    ]
    assert found.entries[0]["clips"] == 2
    assert "right" not in found.entries[0]
    assert "all right" not in found.table
    assert any("float8_e4m3fn" in told for told in found.entries[2]["ran"])
    prompts.write_text("a red ball grows\na red cow grows\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"number 2.*'cow'"):
        evaluate(evaluation)


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "can't be read"), ("\n \n", "holds no prompt")]
)
def test_prompts_that_are_not_there(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    evaluation = Evaluation(
        request=Request(prompt="x"),
        attention=("sdpa",),
        quantization=("none",),
        folder=tmp_path / "out",
        prompts=path,
    )
    with pytest.raises(RequestError, match=sentence):
        evaluate(evaluation)
    assert not (tmp_path / "out").exists()


def test_clips_that_are_not_finite_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated: Callable[..., torch.Tensor] = emulation.sageattn_3

    def spoilt(q: torch.Tensor, *others: torch.Tensor, **options: object) -> torch.Tensor:
        out = emulated(q, *others, **options)
        # One of a batch, so that each is tried alone; and then that one.
        out[-1] = torch.nan
        return out

    monkeypatch.setattr(emulation, "sageattn_3", spoilt)
    monkeypatch.setattr("sagewan.evaluate.cells.decide", _without_self_tests())
    found = evaluate(settings(tmp_path, "sageattn_3"))
    assert found.entries[1]["finite"] == 0
    assert found.entries[1]["right"]["count"] == 0
    assert "sageattn_3: of 3 clips only 0 were finite" in found.table
    assert "NaN" not in (tmp_path / "table.json").read_text()
