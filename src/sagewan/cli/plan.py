"""``sagewan plan``: what would run, and what it would need, from values alone."""

import argparse
import json
from collections.abc import Iterator

from sagewan.cli.flags import add_request_flags, request_from
from sagewan.cli.show import duration
from sagewan.plan.attention import Choice
from sagewan.plan.counted import counted
from sagewan.plan.hardware import GIB
from sagewan.plan.plan import Plan
from sagewan.plan.pretend import CARDS, pretend
from sagewan.plan.serialize import plan_to_json
from sagewan.plan.sparsity import SparsityPlan
from sagewan.plan.speed import estimated_seconds
from sagewan.plan.step_cache import CachePlan

# Smaller lines of a sum are left out, in bytes.
_SHOWN = GIB // 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of a request, and the machine to think of."""
    add_request_flags(parser)
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--vram", type=float, metavar="GIB", help="as if the GPU had this memory")
    parser.add_argument("--ram", type=float, metavar="GIB", help="as if the host had this memory")
    parser.add_argument("--gpu", metavar="NAME", help=f"as if it were a {', '.join(CARDS)}")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan as a table or as JSON."""
    from sagewan.pipeline.draft import ANY_PROMPT, draft_plan
    from sagewan.pipeline.probe import probe

    here = probe()
    hardware = pretend(here, gpu=arguments.gpu, vram=arguments.vram, ram=arguments.ram)
    request = request_from(arguments, prompt=ANY_PROMPT)
    plan = draft_plan(request, hardware, real=hardware is here)
    if arguments.json:
        print(json.dumps(plan_to_json(plan), indent=2))
    else:
        _print(plan)
    return 0


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(plan):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)


def _rows(plan: Plan) -> list[tuple[str, str]]:
    steps = plan.steps
    guidance = f"cfg {steps.cfg:g}" + ("" if steps.cfg_2 is None else f" then {steps.cfg_2:g}")
    rows = [
        ("model", f"{plan.model.name} ({plan.task}), {_count(plan.model.parameters)} parameters"),
        ("device", f"{plan.device.name}, {plan.dtype}, decoded in {plan.decoding.dtype}"),
        ("video", f"{_size(plan.size)}, {counted(plan.frames, 'frame')} at {plan.fps} fps"),
        ("generated", f"{_size(plan.grid_size)}, {plan.tokens} tokens"),
        ("steps", f"{steps.count}, {steps.scheduler}, shift {steps.shift:g}, {guidance}"),
        ("attention", _choice(plan.attention.main)),
    ]
    if plan.sparsity:
        rows.append(("", _left_out(plan, plan.sparsity)))
    if plan.cache:
        rows.insert(5, ("cache", _cached(plan.cache)))
    if plan.attention.ends:
        where = f"first {plan.attention.first} and last {plan.attention.last} steps"
        rows.append(("", f"{where}: {_choice(plan.attention.ends)}"))
    rows += [
        ("", f"{step.from_mode} falls back to {step.to_mode}: {step.why()}")
        for step in plan.attention.fallbacks
    ]
    rows += [("", f"{row.name} is tested before the run") for row in plan.attention.unproven]
    rows.append(("weights", _weights(plan)))
    if plan.weights.main:
        main = plan.weights.main
        rows.append(("", f"{plan.weights.format}, multiplied by {main.name} ({main.compute})"))
        rows += [("", f"{row.name} is tested before the run") for row in plan.weights.unproven]
    rows += [("", f"rounded by the inputs in {path}") for path in plan.weights.measured.values()]
    rows += [("blocks" if first else "", text) for first, text in _first(_blocks(plan))]
    rows += [("memory" if first else "", text) for first, text in _first(_memory(plan))]
    seconds = estimated_seconds(plan)
    if seconds is not None:
        about = "at most about" if plan.cache and plan.cache.reused is None else "about"
        rows.append(("time", f"{about} {_roughly(seconds)}, by the card's listed rates"))
    rows += [("note", note) for note in plan.notes]
    return rows


def _left_out(plan: Plan, sparsity: SparsityPlan) -> str:
    share = sparsity.skipped_of_all(range(plan.steps.count), plan.model.layers)
    return (
        f"{sparsity.sparsity}: {sparsity.kept} of {sparsity.blocks} blocks of keys kept, all in "
        f"the first {counted(sparsity.dense_steps, 'step')} and "
        f"{counted(sparsity.dense_layers, 'layer')}: {share:.0%} left out"
    )


def _cached(cache: CachePlan) -> str:
    if not cache.calibrated:
        return f"{cache.cache.rule}: which steps are reused is for sagewan calibrate to measure"
    if cache.reused is not None:
        steps = ", ".join(str(step + 1) for step in cache.reused)
        told = f"{cache.cache.rule}: {cache.reusable} of {cache.forwards} forwards reused"
        return f"{told} (steps {steps})" if steps else told
    return (
        f"{cache.cache.rule}, the first {cache.first} and the last step always computed: at most "
        f"{cache.reusable} of {cache.forwards} forwards reused"
    )


def _blocks(plan: Plan) -> Iterator[str]:
    """What runs between the products of a block."""
    blocks = plan.blocks
    yield f"{blocks.row.name}" + (" (fused passes)" if blocks.row.fused else "")
    if not blocks.row.fused:
        yield f"not fused: {blocks.why()}"
    for row in blocks.unproven:
        yield f"{row.name} is tested before the run"


def _memory(plan: Plan) -> Iterator[str]:
    """What was decided, and the sum of each stage, in GiB."""
    memory = plan.memory
    yield ", ".join(_decided(plan))
    for stage in memory.stages:
        parts = [
            f"{item.name} {item.device / GIB:.2f}"
            for item in stage.items
            if item.device >= _SHOWN and memory.on_device
        ]
        text = f"{stage.name}: "
        if memory.on_device:
            text += f"{stage.device / GIB:.2f} GiB on the card ({', '.join(parts)}), "
        text += f"{stage.host / GIB:.2f} GiB on the host"
        if stage.pinned:
            text += f", {stage.pinned / GIB:.2f} of it pinned"
        yield text
    if memory.on_device:
        most, room = (f"{nbytes / GIB:.2f}" for nbytes in (memory.device_peak, memory.room))
        if memory.fits_device:
            yield f"at most {most} of {room} GiB on the card"
        else:
            yield f"{most} GiB on the card, where there are {room}"


def _decided(plan: Plan) -> Iterator[str]:
    memory, layers = plan.memory, plan.model.layers
    yield f"{memory.block_swap} of {layers} blocks swapped"
    if memory.chunks.tokens:
        heads = f" and {counted(memory.chunks.heads, 'head')}" if memory.chunks.heads else ""
        yield f"{memory.chunks.tokens} tokens{heads} at a time"
    if memory.decode_tile:
        yield f"VAE in tiles of {_size((memory.decode_tile[1], memory.decode_tile[0]))} cells"
    if memory.text_swap:
        yield f"text encoder with {memory.text_swap} of its blocks swapped"


def _first(texts: Iterator[str]) -> Iterator[tuple[bool, str]]:
    for index, text in enumerate(texts):
        yield index == 0, text


def _weights(plan: Plan) -> str:
    what = "transformer" if plan.model.experts == 1 else f"{plan.model.experts} transformers"
    text = f"{plan.weight_bytes / GIB:.2f} GiB for the {what}"
    # On a GPU the stages stand beside what it has for them.
    if plan.device.memory_free and not plan.memory.on_device:
        text += f"; {plan.device.name} has {plan.device.memory_free / GIB:.1f} GiB free"
    return text


def _roughly(seconds: float) -> str:
    """An estimate has no seconds beside its minutes: ``27 min``, ``2 h 11 min``."""
    if not 60 <= seconds < 3600:
        return duration(seconds)
    return f"{seconds / 60:.0f} min"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _choice(choice: Choice) -> str:
    row = choice.row
    emulated = ", emulated" if row.emulated else ""
    return f"{row.mode} by {row.name} (Q·Kᵀ {row.qk}, P·V {row.pv}{emulated})"


def _count(parameters: int) -> str:
    """14288491584 → ``14.29 billion``, 8589664 → ``8.6 million``."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.2f} billion"
    return f"{parameters / 1e6:.1f} million"
