"""``sagewan plan``: what would run, and what it would need, from values alone."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from sagewan.cli.flags import add_request_flags, request_from
from sagewan.cli.show import counted
from sagewan.plan.attention import Choice
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import GIB
from sagewan.plan.models import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import CARDS, pretend
from sagewan.plan.request import Request
from sagewan.plan.serialize import plan_to_json

# What a plan does not depend on, where it is not given.
_ANY_PROMPT = "any prompt"
_ANY_PICTURE = Path("any picture")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of a request, and the machine to think of."""
    add_request_flags(parser)
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--vram", type=float, metavar="GIB", help="as if the GPU had this memory")
    parser.add_argument("--gpu", metavar="NAME", help=f"as if it were a {', '.join(CARDS)}")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan as a table or as JSON."""
    from sagewan.checkpoint.find import find_model
    from sagewan.checkpoint.lora import find_loras
    from sagewan.pipeline.decide import stored_evidence
    from sagewan.pipeline.probe import probe

    request = request_from(arguments, prompt=_ANY_PROMPT)
    model = find_model(request.model, need_files=False)
    if request.prompt == _ANY_PROMPT:
        model = replace(model, words={})
    here = probe()
    hardware = pretend(here, gpu=arguments.gpu, vram=arguments.vram)
    request = _with_picture(request, model)
    loras = find_loras(request.lora, model)
    plan = make_plan(request, model, hardware, Evidence(), loras)
    if hardware is here:
        plan = make_plan(request, model, hardware, stored_evidence(plan, hardware), loras)
    if arguments.json:
        print(json.dumps(plan_to_json(plan), indent=2))
    else:
        _print(plan)
    return 0


def _with_picture(request: Request, model: Model) -> Request:
    """A model that starts from pictures is planned without them just as well."""
    if TEXT_TO_VIDEO not in model.tasks:
        request = replace(request, image=request.image or _ANY_PICTURE)
        if IMAGE_TO_VIDEO not in model.tasks:
            request = replace(request, last_image=request.last_image or _ANY_PICTURE)
    return request


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
        ("device", f"{plan.device.name}, {plan.dtype}"),
        ("video", f"{_size(plan.size)}, {counted(plan.frames, 'frame')} at {plan.fps} fps"),
        ("generated", f"{_size(plan.grid_size)}, {plan.tokens} tokens"),
        ("steps", f"{steps.count}, {steps.scheduler}, shift {steps.shift:g}, {guidance}"),
        ("attention", _choice(plan.attention.main)),
    ]
    if plan.attention.ends:
        where = f"first {plan.attention.first} and last {plan.attention.last} steps"
        rows.append(("", f"{where}: {_choice(plan.attention.ends)}"))
    rows += [
        ("", f"{step.from_mode} falls back to {step.to_mode}: {step.why()}")
        for step in plan.attention.fallbacks
    ]
    rows += [("", f"{row.name} is tested before the run") for row in plan.attention.unproven]
    rows.append(("weights", _memory(plan)))
    rows += [("note", note) for note in plan.notes]
    return rows


def _memory(plan: Plan) -> str:
    text = f"{plan.weight_bytes / GIB:.2f} GiB for the transformer"
    if plan.device.memory_free:
        text += f"; {plan.device.name} has {plan.device.memory_free / GIB:.1f} GiB free"
    return text


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
