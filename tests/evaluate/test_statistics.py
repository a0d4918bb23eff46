"""The bounds against published values, by simulation, and at their edges."""

import random

import pytest

from sagewan.evaluate.statistics import mean, paired_difference, share


def test_a_share_has_wilsons_bounds() -> None:
    # 8 of 10: 0.4902 to 0.9433, as statistics packages give it.
    found = share([True] * 8 + [False] * 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share([True] * 50).high == 1
    assert share([False] * 50).low == 0
    assert share([True] * 50).low > 0.9


def test_a_paired_difference_is_bonett_and_prices() -> None:
    # 30 lost and 20 gained of 2,048: by hand, (21 − 31)/2050 ± 1.96·√((52/2050 − (10/2050)²)/2050).
    hits = [True] * 20 + [False] * 30 + [True] * 1998
    others = [False] * 20 + [True] * 30 + [True] * 1998
    found = paired_difference(hits, others)
    assert found.value == pytest.approx(-10 / 2048)
    assert (found.low, found.high) == pytest.approx((-0.011766, 0.002010), abs=1e-5)
    assert not found.differs_from_zero
    swapped = paired_difference(others, hits)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_no_change_is_not_certainty() -> None:
    found = paired_difference([True, False] * 500, [True, False] * 500)
    assert found.value == 0
    assert found.low < 0 < found.high < 0.005


def test_the_bounds_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(3)
    inside = {"share": 0, "paired": 0, "mean": 0}
    rounds, count = 300, 150
    for _ in range(rounds):
        hits = [rng.random() < 0.93 for _ in range(count)]
        # A true share of 0.93 · 0.97 + 0.07 · 0.1.
        worse = [rng.random() < (0.97 if hit else 0.1) for hit in hits]
        truth = 0.93 * 0.97 + 0.07 * 0.1 - 0.93
        numbers = [rng.gauss(30, 4) for _ in range(count)]
        for name, found, true in (
            ("share", share(hits), 0.93),
            ("paired", paired_difference(worse, hits), truth),
            ("mean", mean(numbers), 30.0),
        ):
            inside[name] += found.low <= true <= found.high
    assert all(0.91 < hits / rounds < 0.995 for hits in inside.values()), inside


def test_a_planted_loss_is_seen_and_a_lack_of_one_is_not() -> None:
    rng = random.Random(5)
    hits = [rng.random() < 0.95 for _ in range(2000)]
    worse = [hit and rng.random() < 0.98 for hit in hits]
    assert paired_difference(worse, hits).high < 0
    assert paired_difference(hits, hits).differs_from_zero is False


def test_a_mean_of_equal_values_has_no_width() -> None:
    found = mean([2.5] * 7)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))
    assert mean([1.0, 2.0]) == mean([1.0, 2.0])
