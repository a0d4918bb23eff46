"""A step cache: steps in which the transformer is not called, because its answer changes little.

Training-free and off by default. ``easy`` is EasyCache (arXiv:2507.02860). What is reused is known
only in the run; the plan says what can be reused at most.
"""

from dataclasses import dataclass

from sagewan.errors import RequestError

METHODS = ("easy",)
# What of the steps is always computed at the beginning, where the picture is laid out: EasyCache's
# authors compute 10 of 50.
_FIRST_SHARE = 0.2
# A rate of change wants two answers.
_LEAST_FIRST = 2


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """A cache and how much change it lets pass, written ``METHOD:THRESHOLD``; ``threshold`` is the
    share of the transformer's answer by which it may be wrong, summed over the steps reused."""

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
    """The cache of a run of ``steps`` steps: the ``first`` of each expert and the ``last`` one are
    always computed. ``forwards`` are those of a run without it, ``reusable`` the most of them that
    may be left out."""

    cache: StepCache
    steps: int
    first: int
    forwards: int
    reusable: int
    last: int = 1

    def always(self, step: int) -> bool:
        """Whether this step (from 0) is computed whatever happens."""
        return step < self.first or step >= self.steps - self.last


def plan_cache(cache: StepCache | None, steps: int, branches: int) -> CachePlan | None:
    """``branches`` are the forward passes of a step: 2 with guidance."""
    if cache is None:
        return None
    first = max(_LEAST_FIRST, round(_FIRST_SHARE * steps))
    plan = CachePlan(cache=cache, steps=steps, first=first, forwards=steps * branches, reusable=0)
    free = sum(not plan.always(step) for step in range(steps))
    return CachePlan(
        cache=cache, steps=steps, first=first, forwards=steps * branches, reusable=free * branches
    )
