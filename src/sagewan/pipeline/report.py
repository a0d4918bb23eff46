"""What ran, in the form of report.json: asked, planned, counted, measured, written."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagewan import __version__
from sagewan.pipeline.export import Video
from sagewan.pipeline.files import written_whole
from sagewan.pipeline.progress import Timings
from sagewan.pipeline.step_cache import Forwards
from sagewan.plan.catalogue import ROWS
from sagewan.plan.hardware import Hardware
from sagewan.plan.plan import Plan
from sagewan.plan.serialize import plan_to_json, request_to_json
from sagewan.plan.sparsity import SparsityPlan

_PLAIN = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Change:
    """A step down from one mode or implementation to another, and the reason in one line. ``part``
    is what of the report it belongs to: attention, weights or blocks."""

    source: str
    target: str
    why: str
    part: str = "attention"

    def sentence(self) -> str:
        return f"{self.part}: {self.source} gives way to {self.target}: {self.why}"

    def to_json(self) -> dict[str, str]:
        return {"from": self.source, "to": self.target, "why": self.why}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What only the run could tell. ``ran`` are attention's calls, ``multiplied`` those of the
    quantised layers and ``blocks`` those of the blocks; ``masked_calls`` are those of attention's
    that left out blocks of keys; ``forwards`` tells the passes that were
    computed and those that were reused; ``formats`` counts the matrices of the transformers by
    their format. Bytes; peaks are None where the system does not tell.

    ``pinned_bytes`` is the most host memory that was pinned at once, ``unpinned_blocks`` how many
    swapped blocks were copied from ordinary memory; ``memory_notes`` sentences on what was not as
    planned.
    """

    ran: tuple[Mapping[str, Any], ...]
    weight_bytes: int
    formats: Mapping[str, int]
    multiplied: tuple[Mapping[str, Any], ...]
    blocks: tuple[Mapping[str, Any], ...]
    peak_device_bytes: int | None
    peak_host_bytes: int | None = None
    pinned_bytes: int = 0
    unpinned_blocks: int = 0
    memory_notes: tuple[str, ...] = ()
    forwards: Forwards = field(default_factory=Forwards)
    masked_calls: int = 0


def planned_changes(plan: Plan) -> tuple[Change, ...]:
    """The fallbacks that the plan decided."""
    steps = plan.attention.fallbacks
    return tuple(Change(step.from_mode, step.to_mode, step.why()) for step in steps)


def attention_facts(plan: Plan, changes: Iterable[Change], measured: Measured) -> dict[str, Any]:
    """What was asked of self-attention, what ran as the launcher counted it, and why."""
    emulations = {row.name for row in ROWS if row.emulated}
    return {
        "requested": plan.attention.requested,
        "ran": [dict(row) for row in measured.ran],
        "fallbacks": [change.to_json() for change in changes if change.part == "attention"],
        "emulated": any(row["implementation"] in emulations for row in measured.ran),
        "sparsity": plan.sparsity and _sparsity_facts(plan.sparsity, measured),
    }


def _sparsity_facts(plan: SparsityPlan, measured: Measured) -> dict[str, Any]:
    """The share of the blocks of keys that was left out, of all calls as the launcher counted
    them."""
    calls = sum(row["calls"] for row in measured.ran)
    return {
        "requested": str(plan.sparsity),
        "blocks": plan.blocks,
        "kept": plan.kept,
        "calls": measured.masked_calls,
        "skipped": plan.skipped * measured.masked_calls / calls if calls else 0.0,
    }


def cache_facts(plan: Plan, measured: Measured) -> dict[str, Any] | None:
    """What the step cache left out; None without one."""
    if plan.cache is None:
        return None
    return {
        "requested": plan.cache.cache.rule,
        "forwards": measured.forwards.count,
        "reused": measured.forwards.reused,
        "steps": list(measured.forwards.steps()),
    }


def weights_facts(plan: Plan, changes: Iterable[Change], measured: Measured) -> dict[str, Any]:
    """What the transformers' matrices were stored in and multiplied by, as counted in the run."""
    quantised = {name: count for name, count in measured.formats.items() if name not in _PLAIN}
    plain = not quantised
    return {
        "requested": plan.weights.requested,
        "format": plan.dtype if plain else max(quantised, key=lambda name: quantised[name]),
        "bytes": measured.weight_bytes,
        "compute": plan.dtype if plain else [dict(row) for row in measured.multiplied],
        "layers": dict(measured.formats),
        "measured": {part: str(path) for part, path in plan.weights.measured.items()},
        "fallbacks": [change.to_json() for change in changes if change.part == "weights"],
        "lora": [file.to_json() for file in plan.loras],
    }


def blocks_facts(plan: Plan, changes: Iterable[Change], measured: Measured) -> dict[str, Any]:
    """What ran the blocks between their products, as counted, and why it is not fused."""
    return {
        "ran": [dict(row) for row in measured.blocks],
        "why_not_fused": plan.blocks.why() or None,
        "fallbacks": [change.to_json() for change in changes if change.part == "blocks"],
    }


def software(hardware: Hardware) -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"sagewan": __version__, "python": hardware.python, **hardware.packages}
    if hardware.driver:
        found["driver"] = hardware.driver
    if hardware.torch_cuda:
        found["cuda"] = hardware.torch_cuda
    return found


def make_report(
    plan: Plan,
    hardware: Hardware,
    changes: Collection[Change],
    measured: Measured,
    timings: Timings,
) -> dict[str, Any]:
    """Everything but ``output``, which is known once the file is there (:func:`output_facts`)."""
    return {
        "requested": request_to_json(plan.request),
        "plan": plan_to_json(plan),
        "attention": attention_facts(plan, changes, measured),
        "cache": cache_facts(plan, measured),
        "weights": weights_facts(plan, changes, measured),
        "blocks": blocks_facts(plan, changes, measured),
        "memory": {
            "peak_device_bytes": measured.peak_device_bytes,
            "planned_device_bytes": plan.memory.device_peak,
            "peak_host_bytes": measured.peak_host_bytes,
            "planned_host_bytes": plan.memory.host_peak,
            # Of two experts one is on the device at a time.
            "resident_blocks": plan.model.layers - plan.memory.block_swap,
            "swapped_blocks": plan.memory.block_swap,
            "pinned_bytes": measured.pinned_bytes,
            "unpinned_blocks": measured.unpinned_blocks,
            "notes": list(measured.memory_notes),
        },
        "timings": {
            "stages": dict(timings.stages),
            "steps": list(timings.steps.get("denoise", ())),
            "total": timings.total,
        },
        "software": software(hardware),
    }


def output_facts(path: Path, video: Video, *, rejected: bool) -> dict[str, Any]:
    """The file as it is on the disk, which is no result if it is ``rejected``; the size is (width,
    height) in pixels."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(path),
        "rejected": rejected,
        "frames": video.frames,
        "size": list(video.size),
        "fps": video.fps,
        "sha256": digest,
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, whole or not at all. RequestError if it can't be written."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
