"""Which implementation of which mode runs at each step and layer, and why not another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sagewan.errors import RequestError, UnsupportedError
from sagewan.plan.catalogue import Implementation, Problem, rows_of
from sagewan.plan.evidence import Evidence
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.modes import AUTO, MODES, Preset, Quality, fallback_chain
from sagewan.plan.objection import Objection
from sagewan.plan.request import Request

DEFAULT_QUALITY = Quality.EXCELLENT


@dataclass(frozen=True)
class Fallback:
    """One step down a mode's chain: each implementation of ``from_mode`` with its objection."""

    from_mode: str
    to_mode: str
    objections: tuple[tuple[str, Objection], ...]

    def why(self, language: str = "en") -> str:
        """The reasons in one line; rows with the same objection are said once."""
        sentences = dict.fromkeys(objection.sentence(language) for _, objection in self.objections)
        return "; ".join(sentences)


@dataclass(frozen=True)
class Choice:
    """A mode that was asked for, the row that serves it, and the steps down it took."""

    requested: str
    row: Implementation
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def mode(self) -> str:
        return self.row.mode


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The self-attention of a run. ``ends`` serves the first and last steps and kept layers.

    ``unproven`` are the rows whose self-test for ``problem`` on this device it still waits for.
    """

    requested: str
    problem: Problem
    main: Choice
    ends: Choice | None = None
    first: int = 0
    last: int = 0
    keep_layers: frozenset[int] = frozenset()
    strict: bool = False
    from_preset: bool = False
    unproven: tuple[Implementation, ...] = ()

    def choice(self, step: int, steps: int, layer: int) -> Choice:
        """What runs in this layer (from 0) at this step (from 0) of ``steps``."""
        if self.ends is None:
            return self.main
        at_an_end = step < self.first or step >= steps - self.last
        return self.ends if at_an_end or layer in self.keep_layers else self.main

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self.main,) if self.ends is None else (self.main, self.ends)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every step down, each once."""
        steps = (fallback for choice in self.choices for fallback in choice.fallbacks)
        return tuple(dict.fromkeys(steps))


@dataclass(frozen=True)
class _Chooser:
    """Chooses rows for one problem on one device; notes the rows that still want a self-test."""

    problem: Problem
    device: Device
    hardware: Hardware
    evidence: Evidence
    emulate: bool

    def objection(self, row: Implementation) -> Objection | None:
        return row.objection(self.problem, self.device, self.hardware) or self.evidence.objection(
            row.name
        )

    def unproven(self, row: Implementation) -> bool:
        return not row.trusted and row.name not in self.evidence.tests

    def serve(self, mode: str) -> tuple[Implementation | None, tuple[tuple[str, Objection], ...]]:
        """The first row of a mode without objection, and the objections of those before it."""
        refused: list[tuple[str, Objection]] = []
        for row in rows_of(mode, emulate=self.emulate):
            objection = self.objection(row)
            if objection is None:
                return row, tuple(refused)
            refused.append((row.name, objection))
        return None, tuple(refused) or ((mode, Objection(self._without_rows(mode))),)

    def _without_rows(self, mode: str) -> str:
        return "emulation-only" if rows_of(mode, emulate=True) else "no-kernel"

    def choose(self, requested: str) -> Choice:
        """Walk the chain of a named mode down to the first that can be served."""
        chain = fallback_chain(requested)
        fallbacks: list[Fallback] = []
        for mode, following in zip(chain, (*chain[1:], None), strict=True):
            row, refused = self.serve(mode)
            if row is not None:
                return Choice(requested, row, tuple(fallbacks))
            if following is None:
                raise UnsupportedError(f"{mode}: {refused[0][1].sentence()}")
            fallbacks.append(Fallback(mode, following, refused))
        raise AssertionError("a chain is never empty")

    def fastest(self, floor: Quality) -> Choice:
        """The quickest proven row of the modes at least as good as ``floor``; torch if none."""
        timed = [
            (test.milliseconds, row)
            for row in self.candidates(floor)
            if (test := self.evidence.tests.get(row.name)) and test.milliseconds is not None
        ]
        if timed:
            return Choice(AUTO, min(timed, key=lambda pair: pair[0])[1])
        return Choice(AUTO, self.choose("sdpa").row)

    def untested(self, choices: Iterable[Choice], floor: Quality) -> tuple[Implementation, ...]:
        """The rows whose self-test these choices wait for, each once."""
        rows: list[Implementation] = []
        for choice in choices:
            if choice.requested == AUTO:
                rows += self.untimed(floor)
            elif self.unproven(choice.row):
                rows.append(choice.row)
        return tuple(dict.fromkeys(rows))

    def untimed(self, floor: Quality) -> list[Implementation]:
        """The rows to time before ``auto`` can choose; torch's own too, if it has a rival."""
        rivals = list(self.candidates(floor))
        # Torch's own is no rival where blocks are left out: it only gathers them.
        wanted = len(rivals) > 1 or self.problem.block_mask
        return [row for row in rivals if row.name not in self.evidence.tests and wanted]

    def candidates(self, floor: Quality) -> Iterator[Implementation]:
        """The hardware rows that ``auto`` may take, as far as is known."""
        for mode in MODES.values():
            if mode.quality >= floor:
                rows = (row for row in rows_of(mode.name) if not row.only_masked)
                yield from (row for row in rows if self.objection(row) is None)


def plan_attention(
    request: Request,
    preset: Preset | None,
    problem: Problem,
    device: Device,
    hardware: Hardware,
    evidence: Evidence,
    *,
    layers: int,
) -> AttentionPlan:
    """Choose the rows for a request. Raises UnsupportedError where ``strict`` forbids a fallback,
    and RequestError for layers that the model does not have."""
    _check_layers(request, layers)
    chooser = _Chooser(problem, device, hardware, evidence, request.emulate)
    requested = request.attention or (preset.attention if preset else AUTO)
    floor = preset.quality if preset else DEFAULT_QUALITY
    main = chooser.fastest(floor) if requested == AUTO else chooser.choose(requested)
    ends = request.attention_ends
    at_ends = chooser.choose(ends.mode) if ends else None
    plan = AttentionPlan(
        requested=requested,
        problem=problem,
        main=main,
        ends=at_ends,
        first=ends.first if ends else 0,
        last=ends.last if ends else 0,
        keep_layers=frozenset(request.attention_keep_layers),
        strict=request.strict,
        from_preset=request.attention is None and preset is not None,
        unproven=chooser.untested((main, at_ends) if at_ends else (main,), floor),
    )
    _check_strict(plan)
    return plan


def _check_layers(request: Request, layers: int) -> None:
    if any(layer >= layers for layer in request.attention_keep_layers):
        raise RequestError(
            f"attention_keep_layers: the model's layers are 0 to {layers - 1}, "
            f"not {max(request.attention_keep_layers)}"
        )


def _check_strict(plan: AttentionPlan) -> None:
    if plan.strict and not plan.from_preset and plan.fallbacks:
        first = plan.fallbacks[0]
        raise UnsupportedError(
            f"attention={first.from_mode} can't run here: {first.why()} (strict: no fallback)"
        )
