"""Leaving out calls of the transformer whose answer is known well enough, and saying which.

MagCache (:class:`Scheduled`) is decided in the plan, EasyCache (:class:`Reuse`) in the run. When to
reuse is EasyCache's finding (arXiv:2507.02860): the answer v changes at a nearly constant rate of
the change of the latents x, so that its change can be told before it is computed; while what is
told since the last computed v, relative to v, stays below the threshold, that one takes its place.
EasyCache sums what is told from step to step and adds the last v − x to the latents; told from the
last computed v at once it is off by less, and on a nearly straight flow v itself changes less
(docs/decisions/0008).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagewan.plan.step_cache import CachePlan

if TYPE_CHECKING:
    from torch import Tensor

    from sagewan.model.residuals import Residuals

PROMPT, NEGATIVE = "prompt", "negative"
# Nothing is divided by less.
_LEAST = 1e-12


class Forwards:
    """Which forward passes of a run were computed, and which were reused; a step that is made again
    counts once, as it was made last."""

    def __init__(self) -> None:
        self._reused: dict[tuple[int, str], bool] = {}

    def note(self, step: int, part: str, *, reused: bool) -> None:
        """One of guidance's passes at a step (from 0)."""
        self._reused[step, part] = reused

    @property
    def count(self) -> int:
        return len(self._reused)

    @property
    def reused(self) -> int:
        """How many were not computed."""
        return sum(self._reused.values())

    def steps(self) -> tuple[int, ...]:
        """The steps, from 1, at which any was reused."""
        return tuple(sorted({step + 1 for (step, _), reused in self._reused.items() if reused}))


@dataclass(frozen=True, kw_only=True)
class _Course:
    """The prompt's pass through one expert, as it was last computed: the ``latents`` it was given
    and the ``answer`` it gave, both [B, C, F, H, W] float32, and the ``rate`` |Δv| / |Δx| to them
    from those computed before, None for the first."""

    latents: "Tensor"
    answer: "Tensor"
    rate: float | None = None

    def computed(self, latents: "Tensor", answer: "Tensor") -> "_Course":
        """As it goes on with a new answer."""
        moved = max(_size(latents - self.latents), _LEAST)
        return _Course(latents=latents, answer=answer, rate=_size(answer - self.answer) / moved)

    def error(self, latents: "Tensor") -> float:
        """How far the answer is off for these latents, as far as can be told: a share of it."""
        if self.rate is None:
            return math.inf
        return self.rate * _size(latents - self.latents) / max(_size(self.answer), _LEAST)


class Scheduled:
    """MagCache: the plan knows the steps at which the blocks are left out and what they added last
    is added again; this says so to ``residuals``, which belong to one turn. After a run was broken
    off nothing is kept, so that a step may be computed which the plan wanted reused."""

    def __init__(self, reused: Collection[int], forwards: Forwards, residuals: "Residuals") -> None:
        self._reused = reused
        self._forwards = forwards
        self._residuals = residuals

    def copy(self) -> "Scheduled":
        """Itself: it has no state of its own."""
        return self

    def forward(
        self, step: int, _expert: int, part: str, _: "Tensor", compute: "Callable[[], Tensor]"
    ) -> "Tensor":
        """The answer at a step (from 0), in one of guidance's passes."""
        residuals = self._residuals
        residuals.reuse = step in self._reused and residuals.knows(part)
        residuals.keep = step + 1 in self._reused
        answer = compute()
        self._forwards.note(step, part, reused=residuals.reuse)
        return answer


class Reuse:
    """EasyCache, or no cache: decides for each step whether it is computed, by the pass with the
    prompt, which the other follows, because guidance multiplies their difference. The state is of
    one run, and can be copied: what is in it is never changed."""

    def __init__(self, plan: CachePlan | None, forwards: Forwards) -> None:
        self._plan = plan
        self._forwards = forwards
        self._courses: dict[int, _Course] = {}
        self._negatives: dict[int, Tensor] = {}
        self._reusing = False

    def copy(self) -> "Reuse":
        """The same state, unharmed by later steps of this one."""
        other = Reuse(self._plan, self._forwards)
        other._courses, other._negatives = dict(self._courses), dict(self._negatives)
        return other

    def forward(
        self, step: int, expert: int, part: str, latents: "Tensor", compute: "Callable[[], Tensor]"
    ) -> "Tensor":
        """The answer of an expert to these latents at a step (from 0), in one of guidance's passes,
        the prompt's first: computed, or its last one."""
        if self._plan is None:
            answer = compute()
        elif part == PROMPT:
            answer = self._prompt(self._plan, step, expert, latents, compute)
        else:
            answer = self._negative(expert, compute)
        self._forwards.note(step, part, reused=self._reusing)
        return answer

    def _prompt(
        self,
        plan: CachePlan,
        step: int,
        expert: int,
        latents: "Tensor",
        compute: "Callable[[], Tensor]",
    ) -> "Tensor":
        course = self._courses.get(expert)
        self._reusing = (
            course is not None
            and not plan.always(step)
            and course.error(latents) < plan.cache.threshold
        )
        if course is None or not self._reusing:
            answer = compute()
            first = _Course(latents=latents, answer=answer)
            course = course.computed(latents, answer) if course else first
            self._courses[expert] = course
        return course.answer

    def _negative(self, expert: int, compute: "Callable[[], Tensor]") -> "Tensor":
        self._reusing = self._reusing and expert in self._negatives
        if not self._reusing:
            self._negatives[expert] = compute()
        return self._negatives[expert]


def begin(
    plan: CachePlan | None,
    forwards: Forwards,
    residuals: "Residuals",
    before: "Reuse | Scheduled | None",
) -> "Reuse | Scheduled":
    """What decides about the passes of a run, or of the rest of one, which goes on with what it
    knew."""
    if plan and plan.reused is not None:
        return Scheduled(plan.reused, forwards, residuals)
    return before.copy() if isinstance(before, Reuse) else Reuse(plan, forwards)


def _size(x: "Tensor") -> float:
    return float(x.abs().mean())
