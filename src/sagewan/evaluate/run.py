"""An evaluation from its settings to its table: modes × quantizations against exact attention on
weights in the plan's own dtype, from the same seeds."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagewan.attention.launch import is_out_of_memory
from sagewan.checkpoint.find import find_model
from sagewan.checkpoint.lora import find_loras
from sagewan.errors import RequestError, UnsupportedError
from sagewan.evaluate.cells import Axes, Cell, Subject, make_cells
from sagewan.evaluate.held_out import Asked, held_out_prompts
from sagewan.evaluate.measure import Batch, Clip
from sagewan.evaluate.record import Record
from sagewan.evaluate.table import chart, markdown, summary
from sagewan.pipeline.denoise import NoMemory
from sagewan.pipeline.files import written_whole
from sagewan.pipeline.probe import probe
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.prompts import read_prompts
from sagewan.pipeline.report import software
from sagewan.pipeline.session import Session
from sagewan.plan.counted import counted
from sagewan.plan.models import Model
from sagewan.plan.plan import Plan
from sagewan.plan.request import Request
from sagewan.plan.serialize import settings
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache

logger = logging.getLogger(__name__)

# Small videos are put together until a transformer's hidden state has so many numbers, on a GPU and
# on a CPU: 256 and 4 of the demo's usual clips. A Wan video is one alone.
_HIDDEN = (256 * 320 * 256, 4 * 320 * 256)
# What a batch and its results depend on, beside the cells.
_SHARED = ("prompt", "negative", "attention", "quantization", "sparsity", "cache", "metadata")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate. ``request`` says all but the prompts and the axes of the cells;
    ``prompts`` is a file with one a line (None: the demo's own), of which the first ``count`` are
    used; ``batch`` how many clips are made at once (None: by their tokens)."""

    request: Request
    attention: tuple[str, ...]
    quantization: tuple[str, ...]
    folder: Path
    sparsity: tuple[Sparsity | None, ...] = (None,)
    cache: tuple[StepCache | None, ...] = (None,)
    prompts: Path | None = None
    count: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("batch", self.batch)):
            if value is not None and value < 1:
                raise RequestError(f"{name}={value}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The files of a finished evaluation, and its table."""

    folder: Path
    table: str
    entries: Sequence[dict[str, Any]]


def evaluate(evaluation: Evaluation, *, watch: Watch | None = None) -> Evaluated:
    """Make every clip in every cell, and write clips.jsonl, table.md, table.json and table.svg.

    An evaluation with the same settings in the same folder goes on where it stopped. Raises
    RequestError for what is wrong with it, RejectedError if the reference is not finite, Cancelled.
    """
    watch = watch or Watch()
    watch.stage("decide")
    request = evaluation.request
    model = find_model(request.model)
    subject = Subject(model=model, loras=find_loras(request.lora, model), hardware=probe())
    asked = _prompts(evaluation, model)
    request = replace(request, prompt=asked[0].prompt)
    axes = Axes(
        evaluation.attention, evaluation.quantization, evaluation.sparsity, evaluation.cache
    )
    cells = make_cells(request, subject, axes, watch)
    if len(cells) > 1 and all(cell.same_as for cell in cells[1:]):
        logger.warning(
            "nothing is compared: all that was asked for runs as %s here; --emulate computes the "
            "quantised modes with their exact number formats, slowly",
            cells[0].name,
        )
    plan = cells[0].decision.plan
    told = _settings(evaluation, plan, cells, asked) | {"software": software(subject.hardware)}
    record = Record(evaluation.folder, told)
    clips = [Clip(index, one, plan.seed + index) for index, one in enumerate(asked)]
    todo = [clip for clip in clips if clip.index not in record.clips]
    watch.stage("evaluate", len(clips))
    with Session() as session, _memory_told(plan):
        for part in _batches(todo, evaluation.batch or _batch_size(plan)):
            record.add(_lines(part, cells, Batch(part, session, watch.silent())))
            watch.step(len(record.clips))
    return _written(evaluation.folder, cells, record, told)


@contextmanager
def _memory_told(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError, NoMemory) as error:
        if not (isinstance(error, NoMemory) or is_out_of_memory(error)):
            raise
        raise UnsupportedError(
            f"{plan.device.name} ran out of memory; choose a smaller --batch, --size or --frames "
            "(what is done is kept)"
        ) from error


def _prompts(evaluation: Evaluation, model: Model) -> list[Asked]:
    path, seed = evaluation.prompts, evaluation.request.seed or 0
    if path is None:
        if not model.is_demo:
            raise RequestError(
                "prompts is missing: give a text file with one prompt a line, such as "
                "--prompts prompts.txt; only the demo model has its own"
            )
        return held_out_prompts(evaluation.count or 16, seed, model)
    prompts = read_prompts(path, model, evaluation.count)
    return [Asked(prompt=prompt) for prompt in prompts]


def _settings(
    evaluation: Evaluation, plan: Plan, cells: Sequence[Cell], asked: Sequence[Asked]
) -> dict[str, Any]:
    """All that the clips depend on; an evaluation goes on only under the same."""
    fields = settings(evaluation.request)
    prompts = "\n".join(one.prompt for one in asked)
    return {
        "request": {name: value for name, value in fields.items() if name not in _SHARED},
        "cells": [cell.name for cell in cells],
        "plan": {
            "model": plan.model.name,
            "dtype": plan.dtype,
            "device": plan.device.name,
            "size": list(plan.size),
            "frames": plan.frames,
            "steps": plan.steps.count,
            "cfg": plan.steps.cfg,
            "shift": plan.steps.shift,
            "scheduler": plan.steps.scheduler,
            "seed": plan.seed,
            "negative": plan.negative,
        },
        # Measured anew, weights are rounded to others.
        "measured": {
            part: hashlib.sha256(path.read_bytes()).hexdigest()
            for part, path in plan.model.measured.items()
        },
        "clips": len(asked),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
    }


def _batch_size(plan: Plan) -> int:
    width = plan.model.heads * plan.model.head_dim
    return max(1, _HIDDEN[0 if plan.device.is_cuda else 1] // (plan.tokens * width))


def _batches(clips: Sequence[Clip], size: int) -> Iterator[Sequence[Clip]]:
    for start in range(0, len(clips), size):
        yield clips[start : start + size]


def _lines(clips: Sequence[Clip], cells: Sequence[Cell], batch: Batch) -> Iterator[dict[str, Any]]:
    found = {cell.name: batch.run(cell) for cell in cells if not cell.same_as}
    for place, clip in enumerate(clips):
        yield {
            "clip": clip.index,
            "prompt": clip.asked.prompt,
            "language": clip.asked.language,
            "seed": clip.seed,
            "cells": {name: results[place] for name, results in found.items()},
        }


def _written(
    folder: Path, cells: Sequence[Cell], record: Record, told: dict[str, Any]
) -> Evaluated:
    entries = summary(cells, [record.clips[index] for index in sorted(record.clips)])
    table = markdown(entries, _heading(told))
    texts = {
        "table.md": table,
        "table.json": json.dumps({"settings": told, "cells": entries}, indent=2) + "\n",
        "table.svg": chart(entries),
    }
    for name, text in texts.items():
        with written_whole(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return Evaluated(folder=folder, table=table, entries=entries)


def _heading(told: dict[str, Any]) -> str:
    plan = told["plan"]
    width, height = plan["size"]
    loras = "".join(f", LoRA {lora}" for lora in told["request"]["lora"])
    return (
        f"{plan['model']}{loras}, {told['clips']} clips of {width}×{height}×{plan['frames']}, "
        f"{counted(plan['steps'], 'step')} ({plan['scheduler']}), cfg {plan['cfg']:g}, "
        f"shift {plan['shift']:g}, "
        f"seeds from {plan['seed']}, on {plan['device']}, torch {told['software'].get('torch')}. "
        f"The reference is exact attention in {plan['dtype']}; brackets are 95 % bounds."
    )
