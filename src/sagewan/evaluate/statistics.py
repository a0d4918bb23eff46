"""Bounds that hold the truth in about 95 of 100 evaluations.

A share of clips: Wilson's interval. A difference of two shares on the same clips: the adjusted
Wald interval for paired proportions of Bonett and Price (Journal of Educational and Behavioral
Statistics 37, 2012), which needs no resampling and stays open where no clip changed. A mean over
clips: the percentile bootstrap, whose draws are the same for every mean of as many clips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_Z = 1.959963984540054  # of the normal distribution, between −z and z lie 95 %
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bounds."""

    value: float
    low: float
    high: float

    @property
    def differs_from_zero(self) -> bool:
        """Whether zero lies outside the bounds."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def share(hits: Sequence[bool]) -> Estimate:
    """The share of true values."""
    count, value = len(hits), sum(hits) / len(hits)
    middle = (value + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = value * (1 - value) / count + _Z**2 / (4 * count**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
    # Rounding must not shut out a share of 0 or 1.
    return Estimate(value, min(value, max(0.0, middle - half)), max(value, min(1.0, middle + half)))


def paired_difference(hits: Sequence[bool], others: Sequence[bool]) -> Estimate:
    """The share of ``hits`` minus that of ``others``, whose values are of the same clips."""
    count = len(hits)
    gained = sum(a and not b for a, b in zip(hits, others, strict=True))
    lost = sum(b and not a for a, b in zip(hits, others, strict=True))
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = _Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    value, middle = (gained - lost) / count, up - down
    return Estimate(value, max(-1.0, middle - half), min(1.0, middle + half))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of one value for each clip."""
    all_values = torch.tensor(values, dtype=torch.float64)
    means = all_values[_draws(len(values))].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(all_values.mean()), low, high)


@cache
def _draws(count: int) -> Tensor:
    """Which clips each resample takes: int64 [resamples, count]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (_RESAMPLES, count), generator=generator)
