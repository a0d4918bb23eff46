"""A step cache: steps in which the transformer is not called, because its answer changes little.

Training-free and off by default. ``easy`` is EasyCache (arXiv:2507.02860): what it reuses is known
only in the run, and the plan says what can be reused at most. ``mag`` is MagCache
(arXiv:2506.09045): what its blocks add to the tokens shrinks or grows from step to step by factors
that are much the same for every prompt, so that they are measured once and the plan knows which
steps are reused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """A cache and how much change it lets pass, written ``METHOD:THRESHOLD``; ``threshold`` is the
    share of the transformer's answer by which it may be off: for ``mag`` in sum over the steps that
    are reused in a row."""

    method: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> "StepCache":
        method, _, number = text.partition(":")
        try:
            threshold = float(number)
        except ValueError:
            threshold = -1.0
        if method not in METHODS or not 0 < threshold <= 1:
            raise RequestError(
                f"cache={text}: write METHOD:THRESHOLD with a threshold above 0 and up to 1, such "
                f"as easy:0.05 (methods: {', '.join(METHODS)})"
            )
        return cls(method=method, threshold=threshold)

    def __str__(self) -> str:
        return f"{self.method}:{self.threshold:.10g}"


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

    def always(self, step: int) -> bool:
        """Whether this step (from 0) is computed whatever happens."""
        return step < self.first or step >= self.steps - self.last

    @property
    def keeps_residuals(self) -> bool:
        """Whether what the blocks add is kept for the next step: as much as the hidden state, for
        each pass of a step."""
        return self.cache.method == MAG


def plan_cache(
    cache: StepCache | None, steps: int, branches: int, magnitudes: Magnitudes | None = None
) -> CachePlan | None:
    """``branches`` are the forward passes of a step: 2 with guidance; ``magnitudes`` those that
    were measured for this model and these steps, None if they were not."""
    if cache is None:
        return None
    first = max(_LEAST_FIRST, round(_FIRST_SHARE * steps))
    plan = CachePlan(cache=cache, steps=steps, first=first, forwards=steps * branches)
    if cache.method == EASY:
        free = sum(not plan.always(step) for step in range(steps))
        return replace(plan, reusable=free * branches)
    if magnitudes is None or len(magnitudes) != steps:
        return replace(plan, reused=(), calibrated=False)
    reused = tuple(_reused(plan, magnitudes))
    return replace(plan, reused=reused, reusable=len(reused) * branches)


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
