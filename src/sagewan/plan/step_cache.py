"""A step cache: steps in which the transformer is not called, because its answer changes little.

Training-free and off by default. ``easy`` is EasyCache (arXiv:2507.02860): what it reuses is known
only in the run, and the plan says what can be reused at most. ``mag`` is MagCache
(arXiv:2506.09045): what its blocks add to the tokens shrinks or grows from step to step by factors
that are much the same for every prompt, so that they are measured once and the plan knows which
steps are reused.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sagewan.errors import RequestError

EASY, MAG = "easy", "mag"
METHODS = (EASY, MAG)
# What of the steps is always computed at the beginning, where the picture is laid out: both papers'
# authors compute a fifth, 10 of 50.
_FIRST_SHARE = 0.2
# A rate of change wants two answers.
_LEAST_FIRST = 2
# The most steps that ``mag`` reuses one after the other, as its authors advise for Wan.
_MOST_IN_A_ROW = 2

# How large what the blocks add is at each step, as a factor of the step before; None where there is
# none before, or it was another expert's.
Magnitudes = tuple[float | None, ...]


# The steps that were reused, from 1, and how many there were: ``@4,6/20``.
_RECORDED = re.compile(r"((?:\d+(?:,\d+)*)?)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The steps (from 0) that a run of ``count`` steps reused."""

    steps: tuple[int, ...]
    count: int

    @classmethod
    def parse(cls, text: str) -> "Recorded | None":
        found = _RECORDED.fullmatch(text)
        if found is None:
            return None
        steps = tuple(int(number) - 1 for number in found[1].split(",") if number)
        count = int(found[2])
        rises = all(a < b for a, b in pairwise((-1, *steps, count)))
        return cls(steps=steps, count=count) if rises else None

    def __str__(self) -> str:
        return f"{','.join(str(step + 1) for step in self.steps)}/{self.count}"


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """A cache and how much change it lets pass, written ``METHOD:THRESHOLD``; ``threshold`` is the
    share of the transformer's answer by which it may be off: for ``mag`` in sum over the steps that
    are reused in a row. ``recorded``, written ``@4,6/20`` behind it, are the steps of a run that is
    made again: whatever has been measured since, they are reused."""

    method: str
    threshold: float
    recorded: Recorded | None = None

    @classmethod
    def parse(cls, text: str) -> "StepCache":
        method, _, rest = text.partition(":")
        number, at, steps = rest.partition("@")
        recorded = Recorded.parse(steps) if at and method == MAG else None
        try:
            threshold = float(number)
        except ValueError:
            threshold = -1.0
        if method not in METHODS or not 0 < threshold <= 1 or (at and recorded is None):
            raise RequestError(
                f"cache={text}: write METHOD:THRESHOLD with a threshold above 0 and up to 1, such "
                f"as easy:0.05 (methods: {', '.join(METHODS)})"
            )
        return cls(method=method, threshold=threshold, recorded=recorded)

    @property
    def rule(self) -> str:
        """Without what was recorded: the same for a run and for one made again from it."""
        return f"{self.method}:{self.threshold:.10g}"

    def __str__(self) -> str:
        return self.rule if self.recorded is None else f"{self.rule}@{self.recorded}"


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The cache of a run of ``steps`` steps: the ``first`` and the ``last`` are always computed,
    and of each expert what a method needs to begin. ``forwards`` are those of a run without it,
    ``reusable`` the most of them that may be left out. ``reused`` are the steps (from 0) that will
    be, where that is known beforehand; ``calibrated`` is false where it would be, if the model had
    been measured."""

    cache: StepCache
    steps: int
    first: int
    forwards: int
    reusable: int = 0
    last: int = 1
    reused: tuple[int, ...] | None = None
    calibrated: bool = True

    @property
    def as_made(self) -> StepCache:
        """The cache that makes the same video whatever is measured from now on."""
        if self.reused is None or not self.calibrated:
            return self.cache
        return replace(self.cache, recorded=Recorded(steps=self.reused, count=self.steps))

    def always(self, step: int) -> bool:
        """Whether this step (from 0) is computed whatever happens."""
        return step < self.first or step >= self.steps - self.last

    @property
    def keeps_residuals(self) -> bool:
        """Whether what the blocks add is kept for the next step: as much as the hidden state, for
        each pass of a step."""
        return self.cache.method == MAG


def plan_cache(
    cache: StepCache | None, passes: Sequence[int], magnitudes: Magnitudes | None = None
) -> CachePlan | None:
    """``passes`` are the forward passes of each step: 2 with guidance; ``magnitudes`` those that
    were measured for this model and these steps, None if they were not."""
    if cache is None:
        return None
    steps = len(passes)
    first = max(_LEAST_FIRST, round(_FIRST_SHARE * steps))
    plan = CachePlan(cache=cache, steps=steps, first=first, forwards=sum(passes))
    if cache.method == EASY:
        free = (step for step in range(steps) if not plan.always(step))
        return replace(plan, reusable=sum(passes[step] for step in free))
    recorded = cache.recorded
    if recorded and recorded.count == steps:
        reused = tuple(step for step in recorded.steps if not plan.always(step))
    elif magnitudes is None or len(magnitudes) != steps:
        return replace(plan, reused=(), calibrated=False)
    else:
        reused = tuple(_reused(plan, magnitudes))
    return replace(plan, reused=reused, reusable=sum(passes[step] for step in reused))


def _reused(plan: CachePlan, magnitudes: Sequence[float | None]) -> Iterator[int]:
    """The steps at which the factors since the last computed one, and so the errors they tell of,
    stay below the threshold in sum."""
    factor, error, row = 1.0, 0.0, 0
    for step, magnitude in enumerate(magnitudes):
        if magnitude is not None and not plan.always(step) and row < _MOST_IN_A_ROW:
            factor *= magnitude
            error += abs(1 - factor)
            if error < plan.cache.threshold:
                row += 1
                yield step
                continue
        factor, error, row = 1.0, 0.0, 0
