"""One batch of prompts through one cell after the other, each held to the reference."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sagewan.attention.launch import Launcher
from sagewan.attention.resolve import ImplementationError
from sagewan.errors import RejectedError
from sagewan.evaluate.cells import Cell, ran
from sagewan.evaluate.held_out import Asked, judge
from sagewan.pipeline.build import Components, build
from sagewan.pipeline.conditions import Conditions, encode
from sagewan.pipeline.decode import decode_batch
from sagewan.pipeline.denoise import NotFinite, RowFailed, Snapshot, denoise, predict, start
from sagewan.pipeline.loaded import Loaded
from sagewan.pipeline.metrics import decibels, similarities, square_errors
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.step_cache import Forwards
from sagewan.plan.noise import TRAIN_STEPS
from sagewan.plan.plan import Plan

# The PSNR of a clip that is equal to its reference, byte for byte, so that a mean exists.
EQUAL_DB = 100.0
# SSIM in float64 holds some copies of what it compares.
_COMPARED_AT_ONCE = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """One prompt of an evaluation, by its place in it, and the seed of its noise."""

    index: int
    asked: Asked
    seed: int


@dataclass(frozen=True)
class _Reference:
    """What the reference made of a batch: frames uint8 [B, T, H, W, 3], and, at a few ``points``
    (step, latents) on the way there, what its transformer predicts."""

    frames: Tensor
    points: list[tuple[int, Tensor]]
    predictions: list[Tensor]


class Batch:
    """Some clips that are made at once, by every cell from the same noise."""

    def __init__(self, clips: Sequence[Clip], loaded: Loaded, watch: Watch) -> None:
        self._clips = clips
        self._loaded = loaded
        self._watch = watch
        self._conditions: Conditions | None = None
        self._reference: _Reference | None = None

    def run(self, cell: Cell) -> list[dict[str, Any]]:
        """For each clip what came of it; the reference goes first. Raises RejectedError if the
        reference itself is not finite, and Cancelled."""
        began = time.perf_counter()
        while True:
            try:
                return self._run(cell, began)
            except (RowFailed, ImplementationError) as stop:
                failure = stop.failure if isinstance(stop, RowFailed) else stop
                if failure.row.trusted:
                    raise  # torch itself: unexpected
                cell.without({failure.implementation: failure.objection})

    def _run(self, cell: Cell, began: float) -> list[dict[str, Any]]:
        plan, launcher = cell.decision.plan, Launcher()
        components = build(plan, launcher, self._loaded, self._watch)
        conditions = self._conditions or encode(components, plan, {}, self._prompts)
        self._conditions = conditions
        noise = start(plan, [clip.seed for clip in self._clips])
        latents, reused = _latents(components, plan, conditions, noise, self._watch)
        seconds = (time.perf_counter() - began) / len(self._clips)
        skipped = 0.0
        if plan.sparsity:
            skipped = plan.sparsity.skipped * launcher.masked_calls / launcher.calls
        if cell.is_reference:
            if not latents.isfinite().all():
                raise RejectedError(
                    "the reference itself is not finite, so nothing can be held to it; "
                    "choose --dtype float32"
                )
            points = _points(noise, latents)
            predictions = predict(components, plan, conditions, points)
            frames = decode_batch(components, plan, latents)
            self._reference = _Reference(frames, points, predictions)
            likeness: list[dict[str, Any]] = [{} for _ in self._clips]
        else:
            frames = decode_batch(components, plan, latents)
            likeness = self._likeness(frames, latents, components, plan)
        told = ran(launcher.ran(), components.multiplier.ran())
        shared = {"ran": told, "seconds": round(seconds, 4), "skipped": skipped}
        return [
            shared | {"reused": share} | alike | right
            for share, alike, right in zip(reused, likeness, self._right(frames), strict=True)
        ]

    @property
    def _prompts(self) -> list[str]:
        return [clip.asked.prompt for clip in self._clips]

    def _likeness(
        self, frames: Tensor, latents: Tensor, components: Components, plan: Plan
    ) -> list[dict[str, Any]]:
        reference, conditions = self._reference, self._conditions
        if reference is None or conditions is None:
            raise RuntimeError("the reference runs first")
        found = predict(components, plan, conditions, reference.points)
        errors = [
            _per_clip(a - b).norm(dim=1) / _per_clip(b).norm(dim=1)
            for a, b in zip(found, reference.predictions, strict=True)
        ]
        dit = torch.stack(errors).mean(0).tolist()
        finite = latents.flatten(1).isfinite().all(1).tolist()
        values = _in_parts(_compare, frames, reference.frames)
        return [
            {
                "psnr": EQUAL_DB if error == 0 else min(EQUAL_DB, decibels(error)),
                "ssim": alike,
                # JSON has no NaN.
                "dit": part if math.isfinite(part) else None,
                "finite": ended,
            }
            for (error, alike), part, ended in zip(values, dit, finite, strict=True)
        ]

    def _right(self, frames: Tensor) -> list[dict[str, Any]]:
        asked = [clip.asked for clip in self._clips]
        if not all(one.objects for one in asked):
            return [{} for _ in asked]
        return [{"right": right} for right in judge(frames, asked)]


def _latents(
    components: Components, plan: Plan, conditions: Conditions, noise: Snapshot, watch: Watch
) -> tuple[Tensor, list[float]]:
    """The batch's latents [B, C, F, H, W], and of each clip the share of the forward passes that
    were reused. Where a clip stops being finite every clip goes on alone, so that the others are
    what they are, and that one is NaN."""
    forwards = Forwards()
    parts = replace(components, forwards=forwards)
    try:
        latents = denoise(parts, plan, conditions, watch, resume=noise)
        return latents, forwards.shares()
    except NotFinite:
        if len(noise.latents) == 1:
            return torch.full_like(noise.latents, math.nan), [0.0]
    alone, shares = [], []
    for clip in range(len(noise.latents)):
        own = Conditions(prompt=conditions.prompt[clip : clip + 1], negative=conditions.negative)
        begin = Snapshot(0, noise.latents[clip : clip + 1], noise.sampler)
        latents, share = _latents(components, plan, own, begin, watch)
        alone.append(latents)
        shares += share
    return torch.cat(alone), shares


def _points(noise: Snapshot, latents: Tensor) -> list[tuple[int, Tensor]]:
    """The reference's results, with as much of their noise as there is a quarter, half and three
    quarters through the steps."""
    times = noise.sampler.times
    steps = sorted({len(times) * quarter // 4 for quarter in (1, 2, 3)})
    points = []
    for step in steps:
        level = float(times[step]) / TRAIN_STEPS
        points.append((step, level * noise.latents + (1 - level) * latents))
    return points


def _compare(frames: Tensor, others: Tensor) -> list[tuple[float, float]]:
    """uint8 [B, T, H, W, 3] → of each clip the mean squared difference, and the mean SSIM."""
    errors = square_errors(frames, others).mean(1).tolist()
    alike = similarities(frames, others).mean(1).tolist()
    return list(zip(errors, alike, strict=True))


def _in_parts(
    compare: Callable[[Tensor, Tensor], list[T]], frames: Tensor, others: Tensor
) -> list[T]:
    pairs = zip(frames.split(_COMPARED_AT_ONCE), others.split(_COMPARED_AT_ONCE), strict=True)
    return [value for part, other in pairs for value in compare(part, other)]


def _per_clip(x: Tensor) -> Tensor:
    return x.flatten(1).double()
