"""From a request to a plan that nothing is left to prove in; what was learnt comes along."""

import logging
import shlex
from dataclasses import dataclass, replace

from sagewan.errors import RequestError
from sagewan.pipeline.magnitudes import load_magnitudes
from sagewan.pipeline.progress import Watch
from sagewan.plan.attention import AttentionPlan
from sagewan.plan.catalogue import ROWS, Implementation, rows_of
from sagewan.plan.evidence import Evidence, Shortage
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.lora import LoraFile
from sagewan.plan.models import Model
from sagewan.plan.modes import MODES
from sagewan.plan.objection import Objection
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A plan, and all it was made from, so that it can be made again when more is known."""

    request: Request
    model: Model
    hardware: Hardware
    evidence: Evidence
    plan: Plan

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        return self.plan.loras

    def after(self, failures: dict[str, Objection]) -> "Decision":
        """The decision once these implementations, by name, are known to fail."""
        evidence = self.evidence
        for name, objection in failures.items():
            evidence = evidence.with_failure(name, objection)
        return decide(self.request, self.model, self.hardware, self.loras, evidence=evidence)

    def after_shortage(self, shortage: Shortage) -> "Decision":
        """The decision once memory has run out; it takes less."""
        evidence = self.evidence.with_shortage(shortage)
        return decide(self.request, self.model, self.hardware, self.loras, evidence=evidence)


def decide(
    request: Request,
    model: Model,
    hardware: Hardware,
    loras: tuple[LoraFile, ...] = (),
    *,
    evidence: Evidence | None = None,
    watch: Watch | None = None,
    calibrating: bool = False,
) -> Decision:
    """Make the plan; prove on the device what it wants proved, and make it again, until it stands.

    ``loras`` is what the request's LoRA files hold; ``evidence`` left out is what earlier runs on
    this device have stored. Raises as :func:`sagewan.plan.plan.make_plan`; that refusal comes
    before anything heavy is imported. A step cache that goes by measurements is refused without
    them, unless they are about to be made (``calibrating``).
    """
    plan = make_plan(request, model, hardware, evidence or Evidence(), loras)
    if evidence is None:
        evidence = stored_evidence(plan, hardware)
        plan = make_plan(request, model, hardware, evidence, loras)
    if not calibrating:
        check_calibrated(plan)
    while plan.attention.unproven or plan.weights.unproven or plan.blocks.unproven:
        evidence = prove(plan.attention, plan.device, hardware, evidence, watch=watch)
        evidence = prove_products(plan, evidence, watch=watch)
        evidence = prove_blocks(plan, hardware, evidence, watch=watch)
        plan = make_plan(request, model, hardware, evidence, loras)
    return Decision(request=request, model=model, hardware=hardware, evidence=evidence, plan=plan)


def stored_evidence(plan: Plan, hardware: Hardware) -> Evidence:
    """What earlier runs have learnt about the problem and the device of this plan."""
    from sagewan.attention.cache import load_evidence

    return with_magnitudes(load_evidence(plan.device, hardware, plan.attention.problem), plan)


def with_magnitudes(evidence: Evidence, plan: Plan) -> Evidence:
    """Evidence that also holds what the plan's step cache goes by, if that was measured."""
    if plan.cache is None or not plan.cache.keeps_residuals:
        return evidence
    return replace(evidence, magnitudes=load_magnitudes(plan))


def check_calibrated(plan: Plan) -> None:
    """RequestError, with the command, if the step cache wants measurements that were not made."""
    if plan.cache and not plan.cache.calibrated:
        raise RequestError(
            f"cache={plan.cache.cache}: {plan.model.name} was not measured for these steps; run "
            f"sagewan calibrate {_measured_by(plan)} first, or choose easy"
        )


def _measured_by(plan: Plan) -> str:
    """The flags that tell what is measured: all that magnitudes are kept by."""
    request, steps = plan.request, plan.steps
    flags: list[tuple[str, object]] = [("model", request.model), ("steps", steps.count)]
    flags += [("shift", repr(steps.shift).removesuffix(".0")), ("scheduler", steps.scheduler)]
    flags += [("boundary", steps.boundary)] if steps.boundary is not None else []
    flags += [("lora", lora) for lora in request.lora]
    pictures = ("image", request.image), ("last-image", request.last_image)
    flags += [(name, path) for name, path in pictures if path]
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags)


def prove(
    attention: AttentionPlan,
    device: Device,
    hardware: Hardware,
    evidence: Evidence,
    *,
    watch: Watch | None = None,
) -> Evidence:
    """Evidence with a self-test of every row that a plan waits for, kept for the next run too."""
    from sagewan.attention.cache import store
    from sagewan.attention.self_test import self_test

    for row in attention.unproven:
        if watch:
            watch.stage(f"self-test of {row.name}")
        test = self_test(row, device, attention.problem)
        if test.objection:
            logger.warning("%s can't be used: %s", row.name, test.objection.sentence())
        store(test, device, hardware, attention.problem)
        evidence = evidence.with_test(test)
    return evidence


def prove_products(plan: Plan, evidence: Evidence, *, watch: Watch | None = None) -> Evidence:
    """Evidence with a self-test of every row for quantised weights that a plan waits for. They take
    a moment, so that nothing is kept of them."""
    from sagewan.model.self_test import self_test

    for row in plan.weights.unproven:
        if watch:
            watch.stage(f"self-test of {row.name}")
        test = self_test(row, plan.device, plan.dtype)
        if test.objection:
            logger.warning("%s can't be used: %s", row.name, test.objection.sentence())
        evidence = evidence.with_test(test)
    return evidence


def prove_blocks(
    plan: Plan, hardware: Hardware, evidence: Evidence, *, watch: Watch | None = None
) -> Evidence:
    """Evidence with a self-test of the row of blocks that a plan waits for, kept as attention's."""
    from sagewan.attention.cache import store
    from sagewan.model.block_self_test import self_test_block

    for row in plan.blocks.unproven:
        if watch:
            watch.stage(f"self-test of {row.name}")
        test = self_test_block(row, plan.device, plan.attention.problem)
        if test.objection:
            logger.warning("%s can't be used: %s", row.name, test.objection.sentence())
        store(test, plan.device, hardware, plan.attention.problem)
        evidence = evidence.with_test(test)
    return evidence


def blame(plan: Plan, step: int) -> Implementation | None:
    """The least precise row that ran at this step (from 0); None if all there was is exact."""
    rows = {
        plan.attention.choice(step, plan.steps.count, layer).row
        for layer in range(plan.model.layers)
    }
    least = min(rows, key=lambda row: (MODES[row.mode].quality, row.name))
    return None if least.mode == "sdpa" else least


def not_finite(row: Implementation, step: int) -> dict[str, Objection]:
    """What NaN at a step (from 0) says: against all rows of its mode, and of every other that is
    no more precise. Nothing is more precise than torch's own, where every chain ends."""
    failed = {
        other.name: Objection("run-not-finite", {"step": str(step + 1)})
        for other in rows_of(row.mode, emulate=True)
    }
    others = {
        other.name: Objection("no-more-precise", {"mode": row.mode})
        for other in ROWS
        if MODES[other.mode].quality <= MODES[row.mode].quality and other.mode != "sdpa"
    }
    return {**others, **failed}
