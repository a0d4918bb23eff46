"""``sagewan calibrate``: what it says, and where it keeps it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sagewan.cache import cache_folder
from sagewan.checkpoint.find import demo_folder
from tests.cli.conftest import Said


def test_it_says_what_was_measured_and_what_a_cache_would_reuse(
    sagewan: Callable[..., Said],
) -> None:
    words = ("--size", "64x64", "--frames", "5", "--steps", "6")
    said = sagewan("calibrate", *words, "--cache", "mag:0.9")
    assert said.code == 0, said.err
    assert "demo, 6 steps, shift 3: – " in said.out
    assert "--cache mag:0.9 reuses " in said.out
    assert f"kept in {cache_folder() / 'magnitudes'}" in said.out
    assert "mag:0.9" in sagewan("plan", *words, "--cache", "mag:0.9").out
    refused = sagewan("plan", *words, "--steps", "7", "--cache", "mag:0.9")
    assert refused.code == 2
    assert "run sagewan calibrate --model demo --steps 7" in refused.err
    elsewhere = sagewan("plan", *words, "--steps", "7", "--cache", "mag:0.9", "--gpu", "h100")
    assert "for sagewan calibrate to measure" in " ".join(elsewhere.out.split())


def test_what_it_can_t_measure_for_is_refused_and_what_it_leaves_out_is_said(
    sagewan: Callable[..., Said],
) -> None:
    words = ("--size", "64x64", "--frames", "5", "--steps", "3")
    refused = sagewan("calibrate", *words, "--cache", "easy:0.05")
    assert refused.code == 2
    assert "easy goes by no measurements" in refused.err
    said = sagewan("calibrate", *words, "--sparsity", "radial:0.75")
    assert said.code == 0, said.err
    assert "sparsity radial:0.75 is left out" in " ".join(said.err.split())


def test_what_can_t_be_kept_is_one_sentence(
    sagewan: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file where the folder would be.
    for name in ("inputs", "magnitudes"):
        (tmp_path / name).touch()
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path))
    words = ("--size", "64x64", "--frames", "5", "--steps", "2")
    for purpose in ("weights", "cache"):
        said = sagewan("calibrate", *words, "--for", purpose)
        assert said.code == 2, said.err
        assert f"what was measured can't be kept in {tmp_path} (File exists): make" in said.err


def test_for_weights_it_says_how_much_it_knows_and_the_plan_goes_by_it(
    sagewan: Callable[..., Said], tmp_path: Path
) -> None:
    # Without the measurements that come with it.
    model = shutil.copytree(
        demo_folder(), tmp_path / "demo", ignore=lambda *_: {"inputs"}, copy_function=os.symlink
    )
    words = ("--model", str(model), "--size", "64x64", "--frames", "5", "--steps", "2")
    assert "rounded by" not in sagewan("plan", *words, "-q", "fp8_scaled").out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball grows\n一个绿色的三角形向左移动\n", encoding="utf-8")
    said = sagewan(
        "calibrate", *words, "--for", "weights", "--prompts", str(prompts), "--lora", "night"
    )
    assert said.code == 0, said.err
    assert "36 layers: at least " in said.out
    assert f"kept in {cache_folder() / 'inputs'}" in said.out
    assert "lora is left out" in " ".join(said.err.split())
    # A long path is broken where the line ends, also within a word.
    planned = "".join(sagewan("plan", *words, "-q", "fp8_scaled").out.split())
    assert f"roundedbytheinputsin{cache_folder() / 'inputs'}" in planned
    assert "rounded by" not in sagewan("plan", *words, "-q", "none").out
    refused = sagewan("calibrate", *words, "--prompts", str(prompts))
    assert refused.code == 2
    assert "one video measures a step cache" in refused.err
