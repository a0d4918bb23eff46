"""Noise → latents: the loop over the steps, for every Wan model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sagewan.attention.launch import is_out_of_memory
from sagewan.attention.resolve import ImplementationError, one_line
from sagewan.memory.placement import Place
from sagewan.model.attention import Turn
from sagewan.model.residuals import Residuals
from sagewan.model.tiles import Tiles
from sagewan.pipeline.build import Components
from sagewan.pipeline.conditions import Conditions
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.schedulers import Sampler, make_sampler
from sagewan.pipeline.step_cache import NEGATIVE, PROMPT, Reuse, Scheduled, begin
from sagewan.plan.noise import TRAIN_STEPS, expert_at
from sagewan.plan.plan import Plan

logger = logging.getLogger(__name__)

# How the answer to a pass is computed: for the videos at these places of a batch, None for all.
Compute = Callable[[Tensor | None], Tensor]
# One of guidance's passes: which, for which latents, and how its answer is computed.
Pass = Callable[[str, Tensor, Compute], Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Where a run can go on from: everything ready for ``step`` (from 0), and finite. ``reuse`` is
    the state of the step cache, None where nothing has run yet."""

    step: int
    latents: Tensor
    sampler: Sampler
    reuse: Reuse | Scheduled | None = None


class NotFinite(Exception):
    """The latents stopped being finite in ``snapshot.step``; the snapshot was taken before it."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(f"the latents stopped being finite at step {snapshot.step + 1}")
        self.snapshot = snapshot

    @property
    def step(self) -> int:
        """The step that spoilt the latents, from 0."""
        return self.snapshot.step


class RowFailed(Exception):
    """An implementation failed in ``snapshot.step``; the snapshot was taken before it."""

    def __init__(self, snapshot: Snapshot, failure: ImplementationError) -> None:
        super().__init__(str(failure))
        self.snapshot = snapshot
        self.failure = failure


class NoMemory(Exception):
    """Memory ran out in ``snapshot.step``; the snapshot was taken before it. ``what`` is the error
    in one line: the error itself would hold what was in memory."""

    def __init__(self, snapshot: Snapshot, what: str) -> None:
        super().__init__(what)
        self.snapshot = snapshot
        self.what = what


@torch.inference_mode()
def denoise(
    components: Components,
    plan: Plan,
    conditions: Conditions,
    watch: Watch,
    *,
    resume: Snapshot | None = None,
    residuals: Residuals | None = None,
) -> Tensor:
    """The video's latents, float32 [1, C, F, H, W] on the plan's device; of B videos at once, if
    the snapshot to begin with and the conditions are of B.

    Noise comes from the plan's seed, drawn on the CPU in float32, so it is the same on every
    device. Raises NotFinite after a step that gave NaN or infinite values, and RowFailed within a
    step, none of whose calls are counted, as NoMemory does; ``resume`` takes their snapshot and
    goes on from there, by the plan given now. Raises Cancelled within a block. ``residuals`` may
    measure what the blocks add.
    """
    state = resume or start(plan)
    latents, sampler = state.latents, state.sampler.copy()
    turn = turn_of(plan, len(sampler.times), watch.check)
    turn.residuals = residuals or turn.residuals
    reuse = begin(plan.cache, components.forwards, turn.residuals, state.reuse)
    watch.stage("denoise", turn.steps)
    with components.attention.during(turn), _experts(components, plan) as expert:
        for step in range(state.step, turn.steps):
            before = Snapshot(step, latents, sampler.copy(), reuse.copy())
            turn.step, time = step, sampler.times[step]
            index = expert_at(float(time), plan.steps.boundary)
            lacking: str | None = None
            try:
                forward = _Forward(expert(index), plan, conditions, turn)
                passed = partial(reuse.forward, step, index)
                with components.counted():
                    prediction = forward.guided(latents, time, plan.steps.guidance(index), passed)
            except ImplementationError as failure:
                raise RowFailed(before, failure) from failure
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lacking = one_line(error)
            if lacking:
                raise NoMemory(before, lacking)
            watch.show(step + 1, partial(_expected, forward, latents, time, prediction))
            latents = sampler.step(prediction, time, latents)
            if not torch.isfinite(latents).all():
                raise NotFinite(before)
            watch.step(step + 1)
    return _with_first_frame(latents, plan, conditions)


def turn_of(plan: Plan, steps: int, check: Callable[[], None]) -> Turn:
    """The turn of a run of so many steps, as it begins."""
    chunks = plan.memory.chunks
    tiling = Tiles.of(plan.sparsity, plan.device.torch_name) if plan.sparsity else None
    return Turn(
        plan.attention,
        steps,
        check,
        chunk=chunks.tokens,
        heads=chunks.heads,
        known={} if plan.memory.text_keys else None,
        sparsity=plan.sparsity,
        tiling=tiling,
    )


@torch.inference_mode()
def predict(
    components: Components, plan: Plan, conditions: Conditions, points: Sequence[tuple[int, Tensor]]
) -> list[Tensor]:
    """The flow that the transformer predicts, without guidance, for each (step from 0, latents
    [B, C, F, H, W] as they are before it). Raises ImplementationError."""
    times = start(plan).sampler.times
    turn = turn_of(plan, len(times), lambda: None)
    with components.attention.during(turn), _experts(components, plan) as expert:
        found = []
        for step, latents in points:
            turn.step, time = step, times[step]
            forward = _Forward(
                expert(expert_at(float(time), plan.steps.boundary)), plan, conditions, turn
            )
            found.append(forward.guided(latents, time, 1.0, _computed))
        return found


def start(plan: Plan, seeds: Sequence[int] = ()) -> Snapshot:
    """The noise of the plan's seed, before the first step; of several seeds, their noises in one
    batch, each the one it has alone. What ``lcm`` adds later comes from the first seed's generator.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds or (plan.seed,)]
    shape, generator = latent_shape(plan), generators[0]
    latents = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])
    device = plan.device.torch_name
    sampler = make_sampler(
        plan.steps.scheduler,
        shift=plan.steps.shift,
        steps=plan.steps.count,
        generator=generator,
        device=device,
    )
    return Snapshot(0, latents.to(device), sampler)


def latent_shape(plan: Plan) -> tuple[int, int, int, int, int]:
    """(1, channels, frames, rows, columns) of the latents."""
    model, (width, height) = plan.model, plan.grid_size
    frames = (plan.frames - 1) // model.temporal + 1
    return 1, model.latent_channels, frames, height // model.spatial, width // model.spatial


@contextmanager
def _experts(components: Components, plan: Plan) -> Iterator[Callable[[int], Any]]:
    """A function that gives the transformer of an index, with only that one in memory."""
    with ExitStack() as stack:
        held: dict[int, Any] = {}

        def expert(index: int) -> Any:
            if index not in held:
                held.clear()
                stack.close()
                components.attention.turn.forget_texts()
                part = components.transformers[index]
                place = Place(
                    device=plan.device.torch_name,
                    swapped=plan.memory.block_swap,
                    pin_budget=plan.memory.pin_budget,
                )
                transformer = stack.enter_context(part.on(place, stays=plan.memory.stays))
                components.blocks.install(transformer, components.attention, plan.blocks.row)
                components.multiplier.install(transformer, plan.weights)
                held[index] = transformer
            return held[index]

        try:
            yield expert
        finally:
            # Whoever still holds the turn would hold the memory of its texts.
            components.attention.turn.forget_texts()


def _computed(_part: str, _latents: Tensor, compute: Compute) -> Tensor:
    return compute(None)


@dataclass(frozen=True)
class _Forward:
    """One transformer with the conditions of a run."""

    transformer: Any
    plan: Plan
    conditions: Conditions
    turn: Turn

    def guided(self, latents: Tensor, time: Tensor, scale: float, passed: Pass) -> Tensor:
        """The predicted flow, float32: with classifier-free guidance where ``scale`` > 1. Each pass
        goes through ``passed``, which may know the answer."""
        answer = passed(PROMPT, latents, partial(self._predict, latents, time, PROMPT))
        if scale <= 1 or self.conditions.negative is None:
            return answer
        without = passed(NEGATIVE, latents, partial(self._predict, latents, time, NEGATIVE))
        return without + scale * (answer - without)

    def _predict(self, latents: Tensor, time: Tensor, part: str, videos: Tensor | None) -> Tensor:
        dtype = self.transformer.dtype
        self.turn.text, self.turn.whole = part, videos is None
        text = self.conditions.prompt if part == PROMPT else self.conditions.negative
        assert text is not None
        if videos is not None:
            latents, text = latents[videos], text[videos] if len(text) > 1 else text
        picture = self.conditions.picture
        prediction: Tensor = self.transformer(
            hidden_states=self._inputs(latents).to(dtype),
            timestep=self._times(latents, time),
            encoder_hidden_states=text.to(dtype).expand(len(latents), -1, -1),
            encoder_hidden_states_image=None if picture is None else picture.to(dtype),
            return_dict=False,
        )[0]
        # The schedulers return latents in the prediction's dtype, and they are to stay float32.
        return prediction.float()

    def _inputs(self, latents: Tensor) -> Tensor:
        known = self.conditions.latents
        if known is None:
            return latents
        if self.plan.model.expand_timesteps:
            return _with_first_frame(latents, self.plan, self.conditions)
        return torch.cat([latents, known], dim=1)

    def _times(self, latents: Tensor, time: Tensor) -> Tensor:
        """[1], or for TI2V [1, tokens]: a token of the given first frame has time 0."""
        if not self.plan.model.expand_timesteps:
            return time.expand(1)
        _, rows, columns = self.plan.model.patch
        times = time.float().expand(latents.shape[2:])[:, ::rows, ::columns].clone()
        if self.conditions.latents is not None:
            times[0] = 0
        return times.reshape(1, -1)


def _expected(forward: _Forward, latents: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
    """The video as it looks to the model at this time: along the flow, straight to its end."""
    end = latents - float(time) / TRAIN_STEPS * prediction
    return _with_first_frame(end, forward.plan, forward.conditions)


def _with_first_frame(latents: Tensor, plan: Plan, conditions: Conditions) -> Tensor:
    """TI2V's latents with the given first frame in its place; any others as they are."""
    if not plan.model.expand_timesteps or conditions.latents is None:
        return latents
    return torch.cat([conditions.latents, latents[:, :, 1:]], dim=2)
