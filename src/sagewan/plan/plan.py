"""The plan: every decision of a run, made before anything runs, from values alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sagewan.errors import RequestError
from sagewan.plan.attention import AttentionPlan, plan_attention
from sagewan.plan.blocks import BlockPlan, plan_blocks
from sagewan.plan.budget.needs import Needs
from sagewan.plan.catalogue import Problem
from sagewan.plan.decoding import Decoding, plan_decoding
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import GIB, Device, Hardware
from sagewan.plan.lora import LoraFile, taught_schedule
from sagewan.plan.memory import MemoryPlan, plan_memory
from sagewan.plan.memory_notes import memory_notes
from sagewan.plan.models import FIRST_LAST_FRAME, IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Model
from sagewan.plan.modes import AUTO, MODES, PRESETS, Preset, Quality
from sagewan.plan.request import Request
from sagewan.plan.sparsity import SparsityPlan, plan_sparsity
from sagewan.plan.step_cache import CachePlan, plan_cache
from sagewan.plan.steps import Steps, plan_steps
from sagewan.plan.weights import (
    QUANTIZED_AS,
    Situation,
    WeightsPlan,
    plan_weights,
    weight_bytes,
)
from sagewan.plan.words import check_words

# The rotary table of Wan has 1024 positions a side; beyond this many tokens nothing was tried.
MAX_TOKENS = 500_000


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
    dtype = _dtype(request, device)
    task = _task(request, model)
    check_words("prompt", request.prompt, model)
    check_words("negative", request.negative or "", model)
    size, frames, fps = _shape(request, model, preset)
    grid_size = _on_grid(size, model)
    tokens = model.tokens(grid_size, frames)
    token_grid = model.token_grid(grid_size, frames)
    steps = plan_steps(request, model, preset, taught_schedule(request.steps, loras))
    _check_tokens(tokens, size, frames)
    sparsity = plan_sparsity(request.sparsity, token_grid, steps.count)
    cache = plan_cache(request.cache, steps.passes, evidence.magnitudes)
    problem = Problem(
        head_dim=model.head_dim,
        dtype=dtype,
        keys=tokens,
        # Where nothing is left out no kernel is given a mask, so none is asked for one.
        block_mask=sparsity is not None and sparsity.leaves_out,
    )
    attention = plan_attention(
        request, preset, problem, device, hardware, evidence, layers=model.layers
    )
    situation = Situation(model, dtype, tokens, device, hardware, evidence)
    weights = plan_weights(request, preset, situation)
    needs = Needs(
        request=request,
        model=model,
        device=device,
        dtype=dtype,
        grid_size=grid_size,
        frames=frames,
        weight_bytes=weights.bytes,
        lora_bytes=sum(file.nbytes for file in loras),
        texts=max(steps.passes),
        quantised_attention=any(MODES[c.mode].quality < Quality.EXACT for c in attention.choices),
        packed=weights.format is not None,
        file_backed=_file_backed(weights, model, dtype),
        keeps_residuals=cache is not None and cache.keeps_residuals,
    )
    memory = plan_memory(needs, hardware, evidence.shortages)
    plan = Plan(
        request=request,
        model=model,
        task=task,
        device=device,
        dtype=dtype,
        size=size,
        grid_size=grid_size,
        frames=frames,
        fps=fps,
        tokens=tokens,
        seed=request.seed if request.seed is not None else 0,
        negative=request.negative if request.negative is not None else model.sampling.negative,
        steps=steps,
        attention=attention,
        weights=weights,
        blocks=plan_blocks(model, attention, device, hardware, evidence),
        memory=memory,
        sparsity=sparsity,
        cache=cache,
        decoding=plan_decoding(device, dtype, grid_size),
        loras=loras,
    )
    swap = preset.block_swap if preset else None
    notes = (*_notes(plan, preset), *memory_notes(needs, memory, hardware, swap))
    return replace(plan, notes=notes)


def _file_backed(weights: WeightsPlan, model: Model, dtype: str) -> bool:
    """Whether the transformer's weights are used as its files have them."""
    if weights.unpacks or weights.format != model.quantized:
        return False
    return model.quantized is not None or not model.made_anew("transformer", dtype)


def _dtype(request: Request, device: Device) -> str:
    return usual_dtype(device) if request.dtype == "auto" else request.dtype


def usual_dtype(device: Device) -> str:
    """What a device computes best in: bfloat16 where the hardware has it, float32 on a CPU."""
    if device.is_cuda:
        return "bfloat16" if device.sm >= 80 else "float16"
    return "float32"


def _task(request: Request, model: Model) -> str:
    if request.last_image:
        if FIRST_LAST_FRAME in model.tasks:
            return FIRST_LAST_FRAME
        takes = "only a first picture" if IMAGE_TO_VIDEO in model.tasks else "no pictures"
        raise RequestError(f"last_image: the model {model.name} takes {takes}; leave it out")
    if request.image:
        if IMAGE_TO_VIDEO in model.tasks:
            return IMAGE_TO_VIDEO
        if FIRST_LAST_FRAME in model.tasks:
            raise RequestError(
                f"last_image is missing: the model {model.name} needs a first and a last picture"
            )
        raise RequestError(
            f"image: the model {model.name} makes videos from text alone; leave it out, or choose "
            "an image-to-video model"
        )
    if TEXT_TO_VIDEO in model.tasks:
        return TEXT_TO_VIDEO
    raise RequestError(f"image is missing: the model {model.name} starts from a picture")


def _shape(
    request: Request, model: Model, preset: Preset | None
) -> tuple[tuple[int, int], int, int]:
    # A preset's size and length are meant for the published models, not for the small demo.
    usual = preset if preset and not model.is_demo else model.sampling
    size = request.size or usual.size
    frames = request.frames or usual.frames
    across, down = model.grid
    if size[0] < across or size[1] < down:
        raise RequestError(
            f"size={size[0]}x{size[1]} is below the grid of {model.name}: "
            f"the smallest is {across}x{down}"
        )
    if (frames - 1) % model.temporal:
        raise RequestError(f"frames={frames}: {model.name} makes {model.temporal}n+1 frames")
    return size, frames, request.fps or model.sampling.fps


def _check_tokens(tokens: int, size: tuple[int, int], frames: int) -> None:
    if tokens > MAX_TOKENS:
        raise RequestError(
            f"size={size[0]}x{size[1]} with frames={frames} makes {tokens} tokens; "
            f"more than {MAX_TOKENS} is refused: choose a smaller size or fewer frames"
        )


def _on_grid(size: tuple[int, int], model: Model) -> tuple[int, int]:
    across, down = model.grid
    return -(-size[0] // across) * across, -(-size[1] // down) * down


def _notes(plan: Plan, preset: Preset | None) -> Iterator[str]:
    """What the user should know before it runs, in sentences."""
    yield from plan.model.notes
    if plan.size != plan.grid_size:
        yield (
            f"{plan.size[0]}x{plan.size[1]} is not on the model's grid: generated at "
            f"{plan.grid_size[0]}x{plan.grid_size[1]} and cropped"
        )
    yield from _lora_notes(plan)
    sparsity = plan.sparsity
    if sparsity and not sparsity.leaves_out:
        yield (
            f"sparsity {sparsity.sparsity} leaves out nothing: {plan.tokens} tokens are too few "
            "blocks; choose a larger size or more frames"
        )
    if plan.cache:
        yield from _cache_notes(plan.cache)
    if plan.steps.scheduler == "lcm" and not any(file.schedule for file in plan.loras):
        yield "the scheduler lcm is for distilled checkpoints: others come out unfinished"
    yield from _weights_notes(plan)
    multiplies = plan.weights.main
    emulated = [choice.row.emulated for choice in plan.attention.choices]
    if plan.request.emulate and not any((*emulated, multiplies and multiplies.emulated)):
        yield f"emulate changes nothing here: {plan.attention.main.mode} runs without emulation"
    if preset:
        yield from _preset_notes(plan, preset)


def _cache_notes(plan: CachePlan) -> Iterator[str]:
    cache, recorded = plan.cache, plan.cache.recorded
    if recorded and recorded.count != plan.steps:
        yield (
            f"the step cache {cache} names steps of a run of {recorded.count}, and {plan.steps} "
            "will run: what was measured for these decides"
        )
    if plan.calibrated and not plan.reusable:
        yield (
            f"the step cache {cache.rule} can leave out none of {plan.steps} steps: "
            f"the first {plan.first} and the last are always computed"
        )


def _weights_notes(plan: Plan) -> Iterator[str]:
    weights, own = plan.weights, plan.model.quantized
    asked = plan.request.quantization
    if own and QUANTIZED_AS.get(asked or "", own) != own:
        yield (
            f"the model's weights are {own} in its files and stay so: made {asked} from those they "
            "would lose twice; quantise the 16-bit files instead"
        )
    if weights.requested == AUTO and weights.quantization in QUANTIZED_AS:
        plain = weight_bytes(plan.model, plan.dtype, None)
        yield (
            f"the transformer's weights are kept as {weights.quantization}: in {plan.dtype} they "
            f"would take {plain / GIB:.1f} of {plan.device.memory_free / GIB:.1f} GiB "
            "(--quantization none keeps them so)"
        )
    main = weights.main
    if main and not main.low and weights.refused:
        why = "; ".join(dict.fromkeys(objection.sentence() for _, objection in weights.refused))
        yield f"{weights.format} weights are unpacked to multiply in {plan.dtype} here: {why}"


def _lora_notes(plan: Plan) -> Iterator[str]:
    for file in plan.loras:
        yield file.sentence()
    taught = taught_schedule(plan.request.steps, plan.loras)
    if taught and plan.request.steps not in (None, taught.steps):
        yield f"the LoRA was distilled for {taught.steps} steps, and {plan.steps.count} will run"
    elif taught and not any(file.schedule for file in plan.loras):
        yield (
            f"{taught.steps} steps with a LoRA: taken for a distilled one (cfg {taught.cfg:g}, "
            f"shift {taught.shift:g}, {taught.scheduler}), where you name no others"
        )


def _preset_notes(plan: Plan, preset: Preset) -> Iterator[str]:
    distilled = any(file.schedule for file in plan.loras)
    if preset.steps <= 8 and plan.steps.count == preset.steps and not distilled:
        yield (
            f"{preset.steps} steps want a distilled checkpoint or a distilled LoRA (--lora), and "
            "none is loaded; with an ordinary one choose --steps"
        )
    if plan.model.is_demo:
        yield "the demo model keeps its own size, length and steps under every preset"
