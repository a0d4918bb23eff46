"""Denoising that learns from a failure: the plan is made again without what failed."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sagewan.errors import RejectedError
from sagewan.pipeline.decide import Decision, blame, not_finite
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.report import Change
from sagewan.plan.catalogue import Implementation, row_named
from sagewan.plan.objection import Objection
from sagewan.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    from sagewan.pipeline.build import Components
    from sagewan.pipeline.conditions import Conditions
    from sagewan.pipeline.denoise import NotFinite, Snapshot

logger = logging.getLogger(__name__)


class LatentsRejectedError(RejectedError):
    """The latents stopped being finite and nothing more precise was left, or allowed, to try.

    ``latents`` are the last finite ones, so that what there is can be looked at.
    """

    def __init__(self, message: str, latents: "torch.Tensor") -> None:
        super().__init__(message)
        self.latents = latents


@dataclass
class Recovery:
    """Denoises under the current decision. After a failure the decision is another one.

    A row that fails in use is left out from then on, and its step is made again. Latents that stop
    being finite are resumed once, from before that step, without the mode that ran there;
    ``strict`` forbids it.
    """

    decision: Decision
    components: "Components"
    conditions: "Conditions"
    watch: Watch
    changes: list[Change] = field(default_factory=list)

    def denoise(self) -> "torch.Tensor":
        """The final latents, finite. Raises LatentsRejectedError, and UnsupportedError where
        ``strict`` forbids to go on without a row that failed."""
        from sagewan.pipeline.denoise import NotFinite, RowFailed, denoise

        resume: Snapshot | None = None
        repeated = False
        while True:
            plan = self.decision.plan
            try:
                return denoise(self.components, plan, self.conditions, self.watch, resume=resume)
            except RowFailed as stop:
                failure = stop.failure
                if row_named(failure.implementation).trusted:
                    raise (failure.__cause__ or failure) from None  # torch itself: unexpected
                self._decide_again({failure.implementation: failure.objection})
                resume = stop.snapshot
            except NotFinite as stop:
                row = blame(plan, stop.step)
                if repeated or row is None or plan.request.strict:
                    raise _rejected(plan, stop) from stop
                self._decide_again(not_finite(row, stop.step))
                resume, repeated = stop.snapshot, True

    def _decide_again(self, failures: dict[str, Objection]) -> None:
        before = self.decision.plan.attention.choices
        self.decision = self.decision.after(failures)
        plan = self.decision.plan
        self.watch.planned(plan)
        for old, new in zip(before, plan.attention.choices, strict=True):
            if old.row.name in failures and old.row != new.row:
                change = _change(old.row, new.row, failures[old.row.name])
                self.changes.append(change)
                logger.warning("%s", change.sentence())


def _change(old: Implementation, new: Implementation, objection: Objection) -> Change:
    names = (old.mode, new.mode) if old.mode != new.mode else (old.name, new.name)
    return Change(*names, objection.sentence())


def _rejected(plan: Plan, failure: "NotFinite") -> LatentsRejectedError:
    attention = plan.attention.choice(failure.step, plan.steps.count, 0)
    main = plan.weights.main
    weights, other = "", "--dtype float32"
    if main and main.low:
        weights, other = f" and weights multiplied as {main.compute}", "--quantization none"
    return LatentsRejectedError(
        f"the latents stopped being finite at step {failure.step + 1} of {plan.steps.count} "
        f"with attention {attention.mode} in {plan.dtype}{weights}; "
        f"try --attention sdpa or {other}",
        failure.snapshot.latents,
    )
