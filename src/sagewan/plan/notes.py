"""What the user should know of a plan before it runs, in sentences."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sagewan.plan.hardware import GIB
from sagewan.plan.lora import taught_schedule
from sagewan.plan.modes import AUTO, Preset
from sagewan.plan.step_cache import CachePlan
from sagewan.plan.weights import QUANTIZED_AS, weight_bytes

if TYPE_CHECKING:
    from sagewan.plan.plan import Plan


def plan_notes(plan: "Plan", preset: Preset | None) -> Iterator[str]:
    """All but what memory has to say: what a preset could not have, what was rounded."""
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
            f"the step cache {cache.rule} can leave out no step: of {plan.steps}, the first "
            f"{plan.first} and the last are always computed"
        )


def _weights_notes(plan: "Plan") -> Iterator[str]:
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


def _lora_notes(plan: "Plan") -> Iterator[str]:
    for file in plan.loras:
        yield file.sentence()
    taught = taught_schedule(plan.request.steps, plan.loras)
    if taught and plan.request.steps not in (None, taught.steps):
        yield (
            f"the LoRA was distilled for another number of steps ({taught.steps}) than will run "
            f"({plan.steps.count})"
        )
    elif taught and not any(file.schedule for file in plan.loras):
        yield (
            f"so few steps ({taught.steps}) with a LoRA: taken for a distilled one "
            f"(cfg {taught.cfg:g}, shift {taught.shift:g}, {taught.scheduler}), "
            "where you name no others"
        )


def _preset_notes(plan: "Plan", preset: Preset) -> Iterator[str]:
    distilled = any(file.schedule for file in plan.loras)
    if preset.steps <= 8 and plan.steps.count == preset.steps and not distilled:
        yield (
            f"{preset.steps} steps want a distilled checkpoint or a distilled LoRA (--lora), and "
            "none is loaded; with an ordinary one choose --steps"
        )
    if plan.model.is_demo:
        yield "the demo model keeps its own size, length and steps under every preset"
