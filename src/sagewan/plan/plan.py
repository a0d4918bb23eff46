"""The plan: every decision of a run, made before anything runs, from values alone."""

from dataclasses import dataclass, replace

from sagewan.plan.attention import AttentionPlan, plan_attention
from sagewan.plan.blocks import BlockPlan, plan_blocks
from sagewan.plan.budget.needs import Needs
from sagewan.plan.catalogue import Problem
from sagewan.plan.decoding import Decoding
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.lora import LoraFile, taught_schedule
from sagewan.plan.memory import MemoryPlan, plan_memory
from sagewan.plan.memory_notes import memory_notes
from sagewan.plan.models import Model
from sagewan.plan.modes import MODES, PRESETS, Preset, Quality
from sagewan.plan.notes import plan_notes
from sagewan.plan.request import Request
from sagewan.plan.shape import Shape, plan_shape, plan_task
from sagewan.plan.sparsity import SparsityPlan, plan_sparsity
from sagewan.plan.step_cache import CachePlan, plan_cache
from sagewan.plan.steps import Steps, plan_steps
from sagewan.plan.weights import Situation, WeightsPlan, plan_weights
from sagewan.plan.words import check_words


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run. Sizes are (width, height): ``size`` is delivered, ``grid_size`` generated.

    ``notes`` are sentences for the user: what a preset could not have, what was rounded.
    """

    request: Request
    model: Model
    task: str
    device: Device
    dtype: str
    size: tuple[int, int]
    grid_size: tuple[int, int]
    frames: int
    fps: int
    tokens: int
    seed: int
    negative: str
    steps: Steps
    attention: AttentionPlan
    weights: WeightsPlan
    blocks: BlockPlan
    memory: MemoryPlan
    decoding: Decoding
    sparsity: SparsityPlan | None = None
    cache: CachePlan | None = None
    loras: tuple[LoraFile, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all the model's transformers."""
        return self.weights.bytes * self.model.experts


def make_plan(
    request: Request,
    model: Model,
    hardware: Hardware,
    evidence: Evidence,
    loras: tuple[LoraFile, ...] = (),
) -> Plan:
    """Decide everything; ``loras`` is what the request's LoRA files hold. Raises RequestError for
    what this model can't do, and UnsupportedError where ``strict`` forbids the substitute that
    this machine needs."""
    preset = PRESETS[request.preset] if request.preset else None
    device = hardware.device(request.device)
    dtype = device.usual_dtype if request.dtype == "auto" else request.dtype
    task = plan_task(request, model)
    check_words("prompt", request.prompt, model)
    check_words("negative", request.negative or "", model)
    shape = plan_shape(request, model, preset)
    steps = plan_steps(request, model, preset, taught_schedule(request.steps, loras))
    situation = Situation(model, dtype, shape.tokens, device, hardware, evidence)
    arithmetic = _arithmetic(request, preset, situation, shape, steps)
    needs = _needs(request, situation, shape, steps, arithmetic, loras)
    plan = Plan(
        request=request,
        model=model,
        task=task,
        device=device,
        dtype=dtype,
        size=shape.size,
        grid_size=shape.grid_size,
        frames=shape.frames,
        fps=shape.fps,
        tokens=shape.tokens,
        seed=request.seed if request.seed is not None else 0,
        negative=request.negative if request.negative is not None else model.sampling.negative,
        steps=steps,
        attention=arithmetic.attention,
        weights=arithmetic.weights,
        blocks=plan_blocks(model, arithmetic.attention, device, hardware, evidence),
        memory=plan_memory(needs, hardware, evidence.shortages),
        decoding=needs.decoding,
        sparsity=arithmetic.sparsity,
        cache=arithmetic.cache,
        loras=loras,
    )
    swap = preset.block_swap if preset else None
    notes = (*plan_notes(plan, preset), *memory_notes(needs, plan.memory, hardware, swap))
    return replace(plan, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Arithmetic:
    """What is computed how, and what is left out."""

    attention: AttentionPlan
    weights: WeightsPlan
    sparsity: SparsityPlan | None
    cache: CachePlan | None


def _arithmetic(
    request: Request, preset: Preset | None, situation: Situation, shape: Shape, steps: Steps
) -> _Arithmetic:
    model, evidence = situation.model, situation.evidence
    sparsity = plan_sparsity(request.sparsity, shape.token_grid, steps.count)
    cache = plan_cache(request.cache, steps.passes, evidence.magnitudes)
    problem = Problem(
        head_dim=model.head_dim,
        dtype=situation.dtype,
        keys=shape.tokens,
        # Where nothing is left out no kernel is given a mask, so none is asked for one.
        block_mask=sparsity is not None and sparsity.leaves_out,
    )
    device, hardware = situation.device, situation.hardware
    attention = plan_attention(
        request, preset, problem, device, hardware, evidence, layers=model.layers
    )
    weights = plan_weights(request, preset, situation)
    return _Arithmetic(attention=attention, weights=weights, sparsity=sparsity, cache=cache)


def _needs(
    request: Request,
    situation: Situation,
    shape: Shape,
    steps: Steps,
    arithmetic: _Arithmetic,
    loras: tuple[LoraFile, ...],
) -> Needs:
    """What the sums of memory are made of."""
    attention, weights, cache = arithmetic.attention, arithmetic.weights, arithmetic.cache
    return Needs(
        request=request,
        model=situation.model,
        device=situation.device,
        dtype=situation.dtype,
        grid_size=shape.grid_size,
        frames=shape.frames,
        format=weights.format,
        lora_bytes=sum(file.nbytes for file in loras),
        texts=max(steps.passes),
        quantised_attention=any(MODES[c.mode].quality < Quality.EXACT for c in attention.choices),
        keeps_residuals=cache is not None and cache.keeps_residuals,
        segments_grow=situation.hardware.segments_grow,
    )
