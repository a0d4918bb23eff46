"""``sagewan calibrate``: what it says, and where it keeps it."""

from collections.abc import Callable

from sagewan.cache import cache_folder
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
