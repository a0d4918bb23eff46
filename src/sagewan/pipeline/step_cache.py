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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagewan.plan.step_cache import CachePlan

if TYPE_CHECKING:
    from torch import Tensor

    from sagewan.model.residuals import Residuals

    # Answers [b, C, F, H, W] to a pass, for the videos at these places of a batch; None for all.
    Compute = Callable[[Tensor | None], Tensor]

PROMPT, NEGATIVE = "prompt", "negative"
# Nothing is divided by less.
_LEAST = 1e-12


class Forwards:
    """Which forward passes of a run were computed, and which were reused; a step that is made again
    counts once, as it was made last. Of a batch, for each video by itself."""

    def __init__(self) -> None:
        self._reused: dict[tuple[int, str], tuple[bool, ...]] = {}

    def note(self, step: int, part: str, *, reused: Sequence[bool]) -> None:
        """One of guidance's passes at a step (from 0), of each video of the batch."""
        self._reused[step, part] = tuple(reused)

    @property
    def count(self) -> int:
        """Passes of a video."""
        return len(self._reused)

    @property
    def reused(self) -> int:
        """How many were computed for no video."""
        return sum(map(all, self._reused.values()))

    def shares(self) -> list[float]:
        """Of each video the share of its passes that was reused."""
        return [sum(of_video) / self.count for of_video in zip(*self._reused.values(), strict=True)]

    def steps(self) -> tuple[int, ...]:
        """The steps, from 1, at which any was reused."""
        return tuple(
            sorted({step + 1 for (step, _), reused in self._reused.items() if any(reused)})
        )


@dataclass(frozen=True, kw_only=True)
class _Course:
    """The prompt's pass through one expert, as it was last computed for each video: the ``latents``
    it was given and the ``answer`` it gave, both [B, C, F, H, W] float32, and the ``rate`` [B]
    |Δv| / |Δx| to them from those computed before, infinite for the first."""

    latents: "Tensor"
    answer: "Tensor"
    rate: "Tensor"

    @classmethod
    def first(cls, latents: "Tensor", answer: "Tensor") -> "_Course":
        return cls(latents=latents, answer=answer, rate=_size(latents) + math.inf)

    def computed(self, videos: "Tensor", latents: "Tensor", answer: "Tensor") -> "_Course":
        """As it goes on with new answers to some of the videos, whose places these are."""
        moved = _size(latents - self.latents[videos]).clamp(min=_LEAST)
        rate = _size(answer - self.answer[videos]) / moved
        return _Course(
            latents=self.latents.index_copy(0, videos, latents),
            answer=self.answer.index_copy(0, videos, answer),
            rate=self.rate.index_copy(0, videos, rate),
        )

    def error(self, latents: "Tensor") -> "Tensor":
        """[B], how far the answer is off for these latents as far as can be told: a share of it."""
        return self.rate * _size(latents - self.latents) / _size(self.answer).clamp(min=_LEAST)


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
        self, step: int, _expert: int, part: str, latents: "Tensor", compute: "Compute"
    ) -> "Tensor":
        """The answer at a step (from 0), in one of guidance's passes."""
        residuals = self._residuals
        residuals.reuse = step in self._reused and residuals.knows(part)
        residuals.keep = step + 1 in self._reused
        answer = compute(None)
        self._forwards.note(step, part, reused=[residuals.reuse] * len(latents))
        return answer


class Reuse:
    """EasyCache, or no cache: decides for each step, and for each video of a batch by itself,
    whether it is computed, by the pass with the prompt, which the other follows, because guidance
    multiplies their difference. The state is of one run, and can be copied: what is in it is never
    changed."""

    def __init__(self, plan: CachePlan | None, forwards: Forwards) -> None:
        self._plan = plan
        self._forwards = forwards
        self._courses: dict[int, _Course] = {}
        self._negatives: dict[int, Tensor] = {}
        self._reusing: list[bool] = []

    def copy(self) -> "Reuse":
        """The same state, unharmed by later steps of this one."""
        other = Reuse(self._plan, self._forwards)
        other._courses, other._negatives = dict(self._courses), dict(self._negatives)
        return other

    def forward(
        self, step: int, expert: int, part: str, latents: "Tensor", compute: "Compute"
    ) -> "Tensor":
        """The answer of an expert to these latents at a step (from 0), in one of guidance's passes,
        the prompt's first: computed, or its last one."""
        if self._plan is None:
            answer, self._reusing = compute(None), [False] * len(latents)
        elif part == PROMPT:
            answer = self._prompt(self._plan, step, expert, latents, compute)
        else:
            answer = self._negative(expert, latents, compute)
        self._forwards.note(step, part, reused=self._reusing)
        return answer

    def _prompt(
        self, plan: CachePlan, step: int, expert: int, latents: "Tensor", compute: "Compute"
    ) -> "Tensor":
        course = self._courses.get(expert)
        self._reusing = [False] * len(latents)
        if course is None:
            course = _Course.first(latents, compute(None))
        else:
            if not plan.always(step):
                self._reusing = (course.error(latents) < plan.cache.threshold).tolist()
            videos, wanted = self._computed(latents)
            if len(videos):
                course = course.computed(videos, latents[videos], compute(wanted))
        self._courses[expert] = course
        return course.answer

    def _negative(self, expert: int, latents: "Tensor", compute: "Compute") -> "Tensor":
        known = self._negatives.get(expert)
        if known is None:
            self._reusing, known = [False] * len(latents), compute(None)
        else:
            videos, wanted = self._computed(latents)
            if len(videos):
                known = known.index_copy(0, videos, compute(wanted))
        self._negatives[expert] = known
        return known

    def _computed(self, latents: "Tensor") -> "tuple[Tensor, Tensor | None]":
        """The places of the videos that are computed, and how ``compute`` is told of them."""
        places = [place for place, reused in enumerate(self._reusing) if not reused]
        videos = latents.new_tensor(places).long()
        return videos, None if len(places) == len(latents) else videos


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


def _size(x: "Tensor") -> "Tensor":
    """The mean magnitude of each of [B, …]."""
    return x.abs().flatten(1).mean(1)
