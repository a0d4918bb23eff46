"""Denoising that learns from a failure: the plan is made again without what failed."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from sagewan.attention.launch import is_out_of_memory
from sagewan.attention.resolve import one_line
from sagewan.errors import RejectedError, UnsupportedError
from sagewan.pipeline.decide import Decision, blame, not_finite
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.report import Change
from sagewan.plan.advice import smaller
from sagewan.plan.budget.text import UMT5_BLOCKS
from sagewan.plan.evidence import Shortage
from sagewan.plan.hardware import GIB
from sagewan.plan.memory import MemoryPlan
from sagewan.plan.objection import Objection
from sagewan.plan.plan import Plan

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from sagewan.pipeline.build import Components
    from sagewan.pipeline.conditions import Conditions
    from sagewan.pipeline.denoise import NotFinite, Snapshot

T = TypeVar("T")

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
    """Works under the current decision. After a failure the decision is another one.

    A row that fails in use is left out from then on, and its step is made again. Latents that stop
    being finite are resumed once, from before that step, without the mode that ran there;
    ``strict`` forbids it. Where memory runs out, the step or stage is made again once, in less:
    more blocks swapped, smaller tiles. ``memory_notes`` say so.
    """

    decision: Decision
    components: "Components"
    watch: Watch
    changes: list[Change] = field(default_factory=list)
    memory_notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.decision.plan

    def surviving(self, stage: str, work: Callable[[Plan], T]) -> T:
        """The result of the work under the current plan; made again, in less memory, where that ran
        out. Raises UnsupportedError if it runs out again."""
        while True:
            lacking: str | None = None
            try:
                return work(self.plan)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lacking = one_line(error)
            # Out of the handler: the error holds the frames that hold what was in memory.
            self._take_less(stage, lacking)

    def encode(self, pictures: "Mapping[str, Image]") -> "Conditions":
        """The conditions of text and pictures, each made again once where memory ran out."""
        from sagewan.pipeline.conditions import encode_prompts, with_pictures

        parts = self.components
        text = self.surviving("text", lambda plan: encode_prompts(parts, plan))
        return self.surviving("picture", lambda plan: with_pictures(text, parts, plan, pictures))

    def denoise(self, conditions: "Conditions") -> "torch.Tensor":
        """The final latents, finite. Raises LatentsRejectedError, and UnsupportedError where
        ``strict`` forbids to go on without a row that failed, or memory ran out again."""
        from sagewan.pipeline.denoise import NoMemory, NotFinite, RowFailed, denoise

        resume: Snapshot | None = None
        repeated = False
        while True:
            plan = self.plan
            try:
                return denoise(self.components, plan, conditions, self.watch, resume=resume)
            except RowFailed as stop:
                failure = stop.failure
                if failure.row.trusted:
                    raise (failure.__cause__ or failure) from None  # torch itself: unexpected
                self._decide_again({failure.implementation: failure.objection})
                resume = stop.snapshot
            except NoMemory as stop:
                self._take_less("denoise", stop.what)
                resume = stop.snapshot
            except NotFinite as stop:
                row = blame(plan, stop.step)
                if repeated or row is None or plan.request.strict:
                    raise rejected(plan, stop) from stop
                self._decide_again(not_finite(row, stop.step))
                resume, repeated = stop.snapshot, True

    def _take_less(self, stage: str, what: str) -> None:
        """Plan again with less memory; UnsupportedError if that was done already, or is no less."""
        before = self.plan.memory
        tile = before.encode_tile if stage == "picture" else before.decode_tile
        evidence = self.decision.evidence
        again = any(shortage.stage == stage for shortage in evidence.shortages)
        shortage = Shortage(stage=stage, block_swap=before.block_swap, tile=tile, what=what)
        decision = self.decision.after_shortage(shortage)
        if again or _means(decision.plan.memory, stage) == _means(before, stage):
            raise out_of_memory(self.plan, what, stage)
        self.decision = decision
        self.watch.planned(decision.plan)
        note = f"memory ran out {_WHILE[stage]} ({what}): made again {_how(decision.plan, stage)}"
        self.memory_notes.append(note)
        logger.warning("%s", note)

    def _decide_again(self, failures: dict[str, Objection]) -> None:
        before = self.decision.plan
        self.decision = self.decision.after(failures)
        plan = self.decision.plan
        self.watch.planned(plan)
        for change in changes_between(before, plan, failures):
            self.changes.append(change)
            logger.warning("%s", change.sentence())


def changes_between(
    before: Plan, after: Plan, failures: Mapping[str, Objection]
) -> Iterator[Change]:
    """What gave way to what when a plan was made again without the rows that failed, by name."""
    for old, new in zip(before.attention.choices, after.attention.choices, strict=True):
        if old.row.name in failures and old.row != new.row:
            names = (old.mode, new.mode) if old.mode != new.mode else (old.row.name, new.row.name)
            yield Change(*names, failures[old.row.name].sentence())
    old_row, new_row = before.blocks.row, after.blocks.row
    if old_row.name in failures and old_row != new_row:
        why = failures[old_row.name].sentence()
        yield Change(old_row.name, new_row.name, why, part="blocks")
    rows = {
        (old.name, after.weights.row(format_, role).name)
        for format_, role, old in before.weights.rows
        if old.name in failures
    }
    for source, target in sorted(rows):
        yield Change(source, target, failures[source].sentence(), part="weights")


# In words of the user's, where memory ran out.
_WHILE = {
    "text": "while the text was encoded",
    "picture": "while the picture was encoded",
    "denoise": "in denoising",
    "decode": "in decoding",
    "": "in this run",
}


def _means(memory: MemoryPlan, stage: str) -> Hashable:
    """What of the plan makes a stage take less memory."""
    means: dict[str, Hashable] = {
        "text": memory.text_swap,
        "picture": memory.encode_tile,
        "denoise": (memory.block_swap, memory.chunks),
        "decode": (memory.decode_tile, memory.stays),
    }
    return means[stage]


def _how(plan: Plan, stage: str) -> str:
    memory = plan.memory
    if stage == "text":
        return f"with {memory.text_swap} of the text encoder's {UMT5_BLOCKS} blocks swapped"
    if stage == "denoise":
        return (
            f"with {memory.block_swap} of {plan.model.layers} blocks swapped and "
            f"{memory.chunks.tokens} tokens at a time"
        )
    tile = memory.encode_tile if stage == "picture" else memory.decode_tile
    size = f"tiles of {tile[1]}x{tile[0]} latent cells" if tile else "smaller pieces"
    return f"in {size}"


def out_of_memory(plan: Plan, what: str, stage: str = "") -> UnsupportedError:
    """What is said where memory ran out, and less of it would not do or was tried: what was asked
    for, of the device or of the host, what was planned and free, and what helps."""
    memory = plan.memory
    on_host = not memory.on_device or what.startswith("MemoryError") or "CPUAllocator" in what
    planned = memory.host_peak if on_host else memory.device_peak
    # What was free, not what is counted on after a shortage.
    free = memory.host_room if on_host else plan.device.memory_free
    where = "the host" if on_host else plan.device.name
    advice = "close other programs"
    # The text takes the same whatever the video is; beside a GPU the host holds weights, and the
    # video only while it is put together from tiles.
    if stage != "text" and (stage == "decode" or not (on_host and memory.on_device)):
        advice = f"choose {smaller(plan.model, plan.frames, plan.grid_size)}, or {advice}"
    return UnsupportedError(
        f"{where} ran out of memory {_WHILE[stage]} ({what}): {planned / GIB:.2f} GiB were planned "
        f"and {free / GIB:.2f} GiB free; {advice}"
    )


def rejected(plan: Plan, failure: "NotFinite") -> LatentsRejectedError:
    """What is said of latents that stopped being finite."""
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
