"""``sagewan bench step`` as a user calls it, on a CPU: tiny, and emulated."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sagewan.bench import growth, step
from tests.cli.conftest import Said

SMALL = ("--device", "cpu", "--size", "64x64", "--rounds", "1")
SHORT = (*SMALL, "--frames", "5")


def test_the_table_and_the_figures(sagewan: Callable[..., Said], tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    said = sagewan(
        "bench", "step", *SHORT, "--modes", "sdpa,sageattn,flash_attn", "--quantizations",
        "none,fp8_scaled", "--emulate", "--json", path,
    )  # fmt: skip
    assert said.code == 0, said.err
    report = json.loads(path.read_text(encoding="utf-8"))
    names = [one["name"] for one in report["results"]]
    assert names == [
        "diffusers",
        "ours bf16 + sdpa",
        "ours bf16 + sageattn",
        "ours fp8_scaled + sdpa",
        "ours fp8_scaled + sageattn",
    ]
    assert all(name in said.out for name in names)
    assert report["results"][0]["over_eager"] == 1
    assert report["results"][2]["attention"] == "emulated.sageattn"
    assert report["tokens"] == 2 * 16
    assert report["packages"]["diffusers"]
    assert "flash_attn is left out" in said.err
    assert all(
        (one["text_ms"] is None) == (one["blocks"] == "diffusers") for one in report["results"]
    )
    assert "computed once a run, are not in it" in said.err
    assert "in every pass they are computed by: diffusers\n" in said.err
    assert "fp8_scaled: matrices are multiplied as fp8 e4m3 × fp8 e4m3" in said.err


def test_growth_says_how_far_the_model_is(
    sagewan: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "TOKENS_ON_CPU", (32, 64))
    path = tmp_path / "growth.json"
    said = sagewan(
        "bench", "step", *SMALL, "--growth", "--modes", "sdpa", "--quantizations", "none",
        "--json", path,
    )  # fmt: skip
    assert said.code == 0, said.err
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [one["name"] for one in report["growth"]] == ["diffusers", "ours bf16 + sdpa"]
    assert [tokens for tokens, _ in report["growth"][0]["points"]] == [32, 64]
    assert "of the model" in said.out
    assert report["rounds"] == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--modes", "sageattn_9"), "sageattn_9"),
        (("--quantizations", "auto"), "auto"),
        (("--rivals", "eager,fastvideo"), "fastvideo"),
        (("--model", "15b"), "model=15b"),
        (("--frames", "80"), "4n+1"),
        (("--frames", "0"), "frames=0"),
        (("--tokens", "0"), "tokens=0"),
        (("--growth", "--tokens", "100"), "--growth has lengths"),
        (("--growth", "--frames", "5"), "--growth has lengths"),
        (("--growth", "--rivals", "eager"), "--growth has lengths"),
        (("--json", "absent/step.json"), "does not exist"),
    ],
)
def test_what_it_does_not_take_is_refused(
    sagewan: Callable[..., Said], words: tuple[str, ...], why: str
) -> None:
    said = sagewan("bench", "step", *words, "--device", "cpu")
    assert said.code == 2
    assert why in said.err
    assert said.out == ""


def test_one_of_ours_that_is_wrong_is_told_by_the_exit_code(
    sagewan: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_error", lambda *_: 0.5)
    said = sagewan("bench", "step", *SHORT, "--modes", "sdpa", "--quantizations", "none")
    assert said.code == 4
    assert "not timed: error above" in said.out
