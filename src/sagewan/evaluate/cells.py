"""The cells of an evaluation: an attention mode with a quantization, and the plan of each."""

from collections.abc import Mapping, Sequence
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

EXACT = "sdpa"
_EMULATED = frozenset(row.name for row in ROWS if row.emulated)


@dataclass
class Cell:
    """One row of the table. ``same_as`` names an earlier cell in which the very same things run, so
    that this one need not; ``changes`` what gave way to something else."""

    attention: str
    quantization: str
    decision: Decision
    changes: list[Change]
    same_as: str | None = None

    @property
    def name(self) -> str:
        return cell_name(self.attention, self.quantization)

    @property
    def is_reference(self) -> bool:
        return (self.attention, self.quantization) == (EXACT, NO_QUANTIZATION)

    def without(self, failures: Mapping[str, Objection]) -> None:
        """Decide again, now that these implementations, by name, are known to fail."""
        before = self.decision.plan
        self.decision = self.decision.after(dict(failures))
        self.changes += changes_between(before, self.decision.plan, failures)


def cell_name(attention: str, quantization: str) -> str:
    return attention if quantization == NO_QUANTIZATION else f"{attention}, {quantization}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, and where."""

    model: Model
    loras: tuple[LoraFile, ...]
    hardware: Hardware


def make_cells(
    request: Request,
    subject: Subject,
    attention: Sequence[str],
    quantization: Sequence[str],
    watch: Watch,
) -> list[Cell]:
    """The reference, exact attention on weights in the plan's own dtype, then every other pair;
    those of one quantization stand together, since it takes loading to change. Proves what the
    plans want proved. Raises as :func:`sagewan.plan.plan.make_plan`."""
    pairs = [(EXACT, NO_QUANTIZATION)]
    pairs += [(mode, kind) for kind in quantization for mode in attention]
    cells: list[Cell] = []
    first_of: dict[object, str] = {}
    for mode, kind in dict.fromkeys(pairs):
        wanted = replace(request, attention=mode, quantization=kind)
        decision = decide(wanted, subject.model, subject.hardware, subject.loras, watch=watch)
        cell = Cell(mode, kind, decision, list(planned_changes(decision.plan)))
        cell.same_as = first_of.get(_what_runs(cell))
        first_of.setdefault(_what_runs(cell), cell.name)
        cells.append(cell)
    return cells


def _what_runs(cell: Cell) -> object:
    plan = cell.decision.plan
    weights = plan.weights
    rows = [(kind, role, row.name) for kind, role, row in weights.rows]
    return plan.attention.main.row.name, weights.format, weights.unpacks, str(rows)


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
