"""The cells of an evaluation: an attention mode with a quantization, sparsity or none and a step
cache or none, and the plan of each."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sagewan.pipeline.decide import Decision, decide
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.recover import changes_between
from sagewan.pipeline.report import Change, planned_changes
from sagewan.plan.catalogue import ROWS
from sagewan.plan.hardware import Hardware
from sagewan.plan.lora import LoraFile
from sagewan.plan.models import Model
from sagewan.plan.objection import Objection
from sagewan.plan.request import NO_QUANTIZATION, Request
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache

EXACT = "sdpa"
_REFERENCE = (EXACT, NO_QUANTIZATION, None, None)
_EMULATED = frozenset(row.name for row in ROWS if row.emulated)


@dataclass
class Cell:
    """One row of the table. ``same_as`` names an earlier cell in which the very same things run, so
    that this one need not; ``changes`` what gave way to something else."""

    attention: str
    quantization: str
    sparsity: Sparsity | None
    cache: StepCache | None
    decision: Decision
    changes: list[Change]
    same_as: str | None = None

    @property
    def name(self) -> str:
        kind = None if self.quantization == NO_QUANTIZATION else self.quantization
        return ", ".join(
            str(part) for part in (self.attention, kind, self.sparsity, self.cache) if part
        )

    @property
    def is_reference(self) -> bool:
        axes = self.attention, self.quantization, self.sparsity, self.cache
        return axes == _REFERENCE

    def without(self, failures: Mapping[str, Objection]) -> None:
        """Decide again, now that these implementations, by name, are known to fail."""
        before = self.decision.plan
        self.decision = self.decision.after(dict(failures))
        self.changes += changes_between(before, self.decision.plan, failures)


@dataclass(frozen=True)
class Axes:
    """What is combined with what."""

    attention: Sequence[str]
    quantization: Sequence[str]
    sparsity: Sequence[Sparsity | None] = (None,)
    cache: Sequence[StepCache | None] = (None,)

    def cells(self) -> Iterator[tuple[str, str, Sparsity | None, StepCache | None]]:
        """The reference first. Those of one quantization stand together, since it takes loading to
        change."""
        combined = itertools.product(self.quantization, self.cache, self.sparsity, self.attention)
        every = ((mode, kind, sparsity, cache) for kind, cache, sparsity, mode in combined)
        yield from dict.fromkeys((_REFERENCE, *every))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, and where."""

    model: Model
    loras: tuple[LoraFile, ...]
    hardware: Hardware


def make_cells(request: Request, subject: Subject, axes: Axes, watch: Watch) -> list[Cell]:
    """The reference, exact attention on weights in the plan's own dtype with nothing left out, then
    all that the axes combine. Proves what the plans want proved. Raises as
    :func:`sagewan.plan.plan.make_plan`."""
    cells: list[Cell] = []
    first_of: dict[object, str] = {}
    for mode, kind, sparsity, cache in axes.cells():
        wanted = replace(request, attention=mode, quantization=kind, sparsity=sparsity, cache=cache)
        decision = decide(wanted, subject.model, subject.hardware, subject.loras, watch=watch)
        changes = list(planned_changes(decision.plan))
        cell = Cell(mode, kind, sparsity, cache, decision, changes)
        cell.same_as = first_of.get(_what_runs(cell))
        first_of.setdefault(_what_runs(cell), cell.name)
        cells.append(cell)
    return cells


def _what_runs(cell: Cell) -> object:
    plan = cell.decision.plan
    weights = plan.weights
    rows = [(kind, role, row.name) for kind, role, row in weights.rows]
    left_out = plan.sparsity, plan.cache
    return plan.attention.main.row.name, weights.format, weights.unpacks, str(rows), left_out


def ran(attention: Sequence[Mapping[str, Any]], weights: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was called, in words, the most frequent first: of attention, then of the products with
    quantised weights."""
    told = []
    for row in attention:
        how = ", ".join(filter(None, (row["implementation"], row["torch_backend"])))
        emulated = ", emulated" if row["implementation"] in _EMULATED else ""
        told.append(f"{row['mode']} ({how}{emulated})")
    told += [f"{row['format']} by {row['implementation']}" for row in weights]
    return list(dict.fromkeys(told))
