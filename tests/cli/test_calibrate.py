"""``sagewan calibrate``: what it says, and where it keeps it."""

from collections.abc import Callable

from tests.cli.conftest import Said


def test_it_says_what_was_measured_and_what_a_cache_would_reuse(
    sagewan: Callable[..., Said],
) -> None:
    words = ("--size", "64x64", "--frames", "5", "--steps", "6")
    said = sagewan("calibrate", *words, "--cache", "mag:0.9")
    assert said.code == 0, said.err
    assert "demo, 6 steps, shift 3: – " in said.out
    assert "--cache mag:0.9 reuses " in said.out
    assert "magnitudes.json" in said.out
    assert "mag:0.9" in sagewan("plan", *words, "--cache", "mag:0.9").out
    refused = sagewan("plan", *words, "--steps", "7", "--cache", "mag:0.9")
    assert refused.code == 2
    assert "run sagewan calibrate --model demo --steps 7" in refused.err
    elsewhere = sagewan("plan", *words, "--steps", "7", "--cache", "mag:0.9", "--gpu", "h100")
    assert "for sagewan calibrate to measure" in " ".join(elsewhere.out.split())
