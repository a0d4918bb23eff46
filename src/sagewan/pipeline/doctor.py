"""What this machine can run: every implementation tried, compared and timed, and why not, else."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sagewan import __version__
from sagewan.errors import UnsupportedError
from sagewan.pipeline.checkup import problems
from sagewan.plan.attention import AttentionPlan, plan_attention
from sagewan.plan.blocks import BlockRow, block_rows
from sagewan.plan.catalogue import Implementation, Problem, rows_of
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.modes import AUTO, MODES
from sagewan.plan.objection import Objection
from sagewan.plan.request import Request

HEAD_DIM = 128
BASELINE = "torch.sdpa"
# Objections that installing a package would answer.
_INSTALLABLE = ("package-missing", "package-version")

# Compares a row of attention's table, or of the blocks', with float64 or a block in float32.
SelfTester = Callable[[Implementation | BlockRow, Device, Problem], SelfTest]


@dataclass(frozen=True, kw_only=True)
class TriedRow:
    """An implementation on this device. Without an objection it passed; ``speed`` is how many
    times as fast as torch's attention it was in the same run."""

    row: Implementation
    objection: Objection | None
    error: float | None = None
    limit: float | None = None
    milliseconds: float | None = None
    speed: float | None = None


@dataclass(frozen=True, kw_only=True)
class TriedMode:
    """What asking for a mode gets: itself, or what it falls back to, and why."""

    name: str
    runs: str
    implementation: str
    why: str | None

    @property
    def itself(self) -> bool:
        return self.runs == self.name or self.name == AUTO


@dataclass(frozen=True, kw_only=True)
class TriedBlock:
    """A way to run a transformer's blocks on this device. Without an objection it passed, or is
    trusted without a test."""

    row: BlockRow
    objection: Objection | None
    error: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that ``sagewan doctor`` says, as values."""

    hardware: Hardware
    device: Device
    problems: tuple[str, ...]
    rows: tuple[TriedRow, ...]
    blocks: tuple[TriedBlock, ...]
    modes: tuple[TriedMode, ...]
    advice: tuple[str, ...]

    def mode(self, name: str) -> TriedMode:
        return {mode.name: mode for mode in self.modes}[name]

    def as_dict(self) -> dict[str, Any]:
        """The same for a script: plain values, and each objection with its sentence."""
        return {
            "sagewan": __version__,
            "hardware": {**asdict(self.hardware), "packages": dict(self.hardware.packages)},
            "device": asdict(self.device),
            "problems": list(self.problems),
            "modes": [{**asdict(mode), "itself": mode.itself} for mode in self.modes],
            "implementations": [_row_as_dict(tried) for tried in self.rows],
            "blocks": [_block_as_dict(tried) for tried in self.blocks],
            "advice": list(self.advice),
        }


def diagnose(hardware: Hardware, device: Device, self_test: SelfTester) -> Diagnosis:
    """Try every row that this device and these packages allow; plan each mode with the result.

    ``self_test`` is called for each such row, torch's own first and then those of the blocks, in
    Wan's head size and the dtype that runs on this device by default. Other rows are not imported.
    """
    problem = Problem(head_dim=HEAD_DIM, dtype=device.usual_dtype)
    evidence = Evidence()
    refused: dict[str, Objection] = {}
    for row in _rows():
        objection = row.objection(problem, device, hardware)
        if objection:
            refused[row.name] = objection
        else:
            evidence = evidence.with_test(self_test(row, device, problem))
    return Diagnosis(
        hardware=hardware,
        device=device,
        problems=tuple(problems(hardware)),
        rows=tuple(_tried(row, refused, evidence) for row in _rows()),
        blocks=tuple(
            _tried_block(row, problem, device, hardware, self_test) for row in block_rows()
        ),
        modes=tuple(_mode(name, problem, device, hardware, evidence) for name in (*MODES, AUTO)),
        advice=tuple(_advice(refused)),
    )


def _rows() -> list[Implementation]:
    return [row for mode in MODES for row in rows_of(mode)]


def _tried(row: Implementation, refused: Mapping[str, Objection], evidence: Evidence) -> TriedRow:
    if row.name in refused:
        return TriedRow(row=row, objection=refused[row.name])
    test = evidence.tests[row.name]
    baseline = evidence.tests.get(BASELINE)
    speed = None
    if test.milliseconds and baseline and baseline.milliseconds:
        speed = baseline.milliseconds / test.milliseconds
    return TriedRow(
        row=row,
        objection=test.objection,
        error=test.error,
        limit=test.limit,
        milliseconds=test.milliseconds,
        speed=speed,
    )


def _tried_block(
    row: BlockRow, problem: Problem, device: Device, hardware: Hardware, self_test: SelfTester
) -> TriedBlock:
    objection = next(row.needs(problem.dtype, device, hardware), None)
    if objection or row.trusted:
        return TriedBlock(row=row, objection=objection)
    test = self_test(row, device, problem)
    return TriedBlock(row=row, objection=test.objection, error=test.error, limit=test.limit)


def _mode(
    name: str, problem: Problem, device: Device, hardware: Hardware, evidence: Evidence
) -> TriedMode:
    request = Request(prompt="doctor", attention=name)
    try:
        plan = plan_attention(request, None, problem, device, hardware, evidence, layers=1)
    except UnsupportedError as error:
        return TriedMode(name=name, runs="nothing", implementation="", why=str(error))
    return TriedMode(
        name=name,
        runs=plan.main.mode,
        implementation=plan.main.row.name,
        why=_why(plan),
    )


def _why(plan: AttentionPlan) -> str | None:
    """The reason for each step down; modes with the same reason are said together."""
    reasons: dict[str, list[str]] = {}
    for fallback in plan.fallbacks:
        reasons.setdefault(fallback.why(), []).append(fallback.from_mode)
    return "; ".join(f"{', '.join(modes)}: {why}" for why, modes in reasons.items()) or None


def _advice(refused: Mapping[str, Objection]) -> list[str]:
    """What could be installed to get more, by mode."""
    return [
        f"{row.mode} by {row.name}: {row.install}"
        for row in _rows()
        if row.install and row.name in refused and refused[row.name].code in _INSTALLABLE
    ]


def _block_as_dict(tried: TriedBlock) -> dict[str, Any]:
    return {
        "name": tried.row.name,
        "fused": tried.row.fused,
        "attention": tried.row.prepares,
        "passed": tried.objection is None,
        "objection": _objection_as_dict(tried.objection),
        "error": tried.error,
        "limit": tried.limit,
    }


def _objection_as_dict(objection: Objection | None) -> dict[str, Any] | None:
    return None if objection is None else {**asdict(objection), "sentence": objection.sentence()}


def _row_as_dict(tried: TriedRow) -> dict[str, Any]:
    row, objection = tried.row, tried.objection
    return {
        "name": row.name,
        "mode": row.mode,
        "qk": row.qk,
        "pv": row.pv,
        "package": row.package,
        "passed": objection is None,
        "objection": _objection_as_dict(objection),
        "error": tried.error,
        "limit": tried.limit,
        "milliseconds": tried.milliseconds,
        "speed": tried.speed,
    }
