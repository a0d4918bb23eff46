"""One whole video on an H100 that is made to look like a smaller card."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.random_models import random_models
from benchmarks.watching import (
    HELD,
    STAGE,
    clear,
    context_bytes,
    enter,
    of_process,
    watched,
)
from benchmarks.zero_files import loaded_models, zero_folder
from sagewan.checkpoint.find import find_model
from sagewan.errors import RejectedError, SagewanError
from sagewan.model.attention import Attention
from sagewan.pipeline.decide import Decision
from sagewan.pipeline.probe import probe
from sagewan.pipeline.progress import Event, Watch
from sagewan.pipeline.run import Prepared, execute
from sagewan.plan.blocks import block_rows
from sagewan.plan.budget.transformer import block_parameters
from sagewan.plan.catalogue import ROWS
from sagewan.plan.evidence import Evidence, SelfTest
from sagewan.plan.hardware import GIB
from sagewan.plan.linear import LINEAR_ROWS
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.pretend import pretend
from sagewan.plan.request import Request
from sagewan.plan.weights import QUANTIZED_AS


@dataclass(frozen=True)
class Card:
    """One whole pipeline on a card of so many GB, with so much host memory in the plan."""

    model: str
    vram: float
    ram: float
    quantization: str
    size: tuple[int, int]
    frames: int
    steps: int = 2
    attention: str = "sdpa"
    # Of the blocks, how many attend; the others leave it out, for time. All have the same peak.
    attending: int | None = None
    # What its files hold; None: no files, and random weights as from a file that has them so.
    files: str | None = None


T2V, A14B, TI2V = "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"
_LOW, _BALANCED, _HIGH = "fp4_scaled", "fp8_scaled", "fp8_scaled"

# Only some of the blocks of large models attend, for time.
CARDS: Mapping[str, Card] = {
    "low-8": Card(T2V, 8, 16, _LOW, (1280, 720), 61, attending=4),
    "low-8-a14b": Card(A14B, 8, 16, _LOW, (1280, 720), 61, attention="sageattn_3", attending=4),
    "low-8-ti2v": Card(TI2V, 8, 16, _LOW, (1280, 704), 61),
    "low-12": Card(T2V, 12, 16, _LOW, (1280, 720), 61, attention="sageattn_3", attending=4),
    "balanced-12": Card(
        T2V, 12, 32, _BALANCED, (1280, 720), 81, attention="sageattn_3_fp8", attending=4
    ),
    "balanced-12-ti2v": Card(TI2V, 12, 32, _BALANCED, (1280, 704), 121, attention="sageattn_3_fp8"),
    "balanced-16": Card(
        T2V, 16, 32, _BALANCED, (1280, 720), 81, attention="sageattn_3_fp8", attending=4
    ),
    "balanced-16-a14b": Card(
        A14B, 16, 32, _BALANCED, (1280, 720), 81, attention="sageattn_3_fp8", attending=4
    ),
    "small-12": Card(T2V, 12, 32, _BALANCED, (832, 480), 81, attending=10),
    "small-16-1.3b": Card("wan2.1-t2v-1.3b", 16, 32, "none", (832, 480), 81),
    "odd-12": Card(T2V, 12, 32, _BALANCED, (960, 544), 49, attending=10),
    "odd-24": Card(A14B, 24, 32, _BALANCED, (1024, 576), 97, attention="sageattn", attending=4),
    # As `sagewan generate` loads a folder: pages of files, weights quantised or made 16 bit.
    "files-16": Card(T2V, 16, 32, "none", (832, 480), 49, attending=10, files="bfloat16"),
    "files-12-fp8": Card(T2V, 12, 32, "fp8_scaled", (832, 480), 49, attending=10, files="bfloat16"),
    "files-8-ti2v": Card(TI2V, 8, 32, _LOW, (1280, 704), 61, files="bfloat16"),
    "files-12-float32": Card(TI2V, 12, 32, "none", (832, 480), 49, files="float32"),
    # 252,960 tokens: one step of each expert.
    "quality-16": Card(
        T2V, 16, 32, _HIGH, (1920, 1080), 121, 1, attention="sageattn_3", attending=2
    ),
    "quality-24-a14b": Card(
        A14B, 24, 32, _HIGH, (1920, 1080), 121, 2, attention="sageattn_3", attending=2
    ),
}


class CutOffError(Exception):
    """The time is over; what was seen so far is told."""


def pipeline(card: Card, layers: int | None) -> dict[str, Any]:
    """One video on the pretended card: memory planned and used, GiB."""
    clear()
    context = context_bytes()
    torch.cuda.set_per_process_memory_fraction(
        max(0.01, ((card.vram - 0.5) * GIB - context) / torch.cuda.mem_get_info()[1])
    )
    components: list[Any] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = _model(card, Path(folder), layers)
            output = Path(folder) / "x.mp4"
            plan, hardware = _plan(card, model, output)
            decision = Decision(
                request=plan.request,
                model=model,
                hardware=hardware,
                evidence=_proved(),
                plan=plan,
            )
            models = loaded_models if card.files else random_models
            with models(components), _attending(card, model), watched() as peak:
                outcome, report, plans = _run(decision, output)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = _facts(card, [plan, *plans[1:]], components[0], peak, report)
    return {"outcome": outcome, "context": round(context / GIB, 3), **found}


def _model(card: Card, folder: Path, layers: int | None) -> Model:
    if card.files:
        return find_model(str(zero_folder(card.model, card.files, folder / "model")))
    # As from a file that has them quantised: nothing of them has to be on the host.
    model = replace(PUBLISHED[card.model], quantized=QUANTIZED_AS.get(card.quantization))
    return with_layers(model, layers) if layers else model


def _facts(
    card: Card, plans: list[Plan], components: Any, peak: Mapping[str, Any], report: Any
) -> dict[str, Any]:
    beyond = [used - torch.cuda.memory_reserved() for used in of_process()]
    # The first plan is what `sagewan plan` says; where memory ran out, the last is what was done.
    memory, last = plans[0].memory, plans[-1].memory
    return {
        "beyond_torch_after": [round(nbytes / GIB, 3) for nbytes in beyond],
        "survived": len(plans) - 1,
        "planned": round(memory.device_peak / GIB, 3),
        "used": round(peak["device"] / GIB, 3),
        "limit": card.vram - 0.5,
        "stages": {stage.name: round(stage.device / GIB, 2) for stage in memory.stages},
        "used_by_stage": {
            name: {key: round(value / GIB, 3) for key, value in found.items()}
            for name, found in peak["stages"].items()
        },
        "stand_ins": {k: round(v / GIB, 3) for k, v in HELD["stand_ins"].items()},
        "pinned": round(components.pinned_bytes / GIB, 3),
        "planned_pinned_by_stage": {s.name: round(s.pinned / GIB, 3) for s in last.stages},
        "planned_host": round(memory.host_peak / GIB, 2),
        "planned_host_by_stage": {s.name: round(s.host / GIB, 2) for s in last.stages},
        "items": {
            stage.name: {item.name: round(item.device / GIB, 3) for item in stage.items}
            for stage in last.stages
        },
        "experts_ran": sum(part.weight_bytes > 0 for part in components.transformers),
        "attention": plans[-1].attention.main.row.name,
        "swapped": last.block_swap,
        "text_swapped": last.text_swap,
        "chunks": [last.chunks.tokens, last.chunks.heads],
        "tile": last.decode_tile,
        "notes": report.get("memory", {}).get("notes", []) if report else [],
        "timings": report.get("timings", {}).get("stages", {}) if report else {},
    }


def _run(decision: Decision, output: Path) -> tuple[str, Mapping[str, Any], list[Plan]]:
    """The outcome in words, the report, and the plans: one, and one more for each shortage."""
    plans: list[Plan] = []

    began = time.perf_counter()

    def note(event: Event) -> None:
        if event.done in (0, 1, event.total):
            now = time.perf_counter() - began
            print(f"{now:7.1f} s {event.stage} {event.done}", file=sys.stderr, flush=True)
        enter(event.stage)
        if event.plan:
            plans.append(event.plan)
        # Tiles are decoded before the first frame is written, and then the decoder leaves.
        written = event.stage == "decode" and event.done == 1 and plans[-1].memory.decode_tile
        if written and HELD["given_back"]:
            HELD["given_back"].touch()

    watch = Watch(note)
    try:
        result = execute(Prepared(decision=decision, pictures={}), watch)
    except RejectedError as error:
        # Random weights make no video to speak of; all of the memory was used all the same.
        path = decision.request.report
        report = json.loads(path.read_text()) if path and path.exists() else {}
        return f"rejected ({error})"[:80], report, plans
    except SagewanError as error:
        return f"failed ({error})", {}, plans
    except CutOffError:
        return f"failed (cut off in {STAGE['now']})", {}, plans
    assert output.exists()
    return "made", result.report, plans


def _plan(card: Card, model: Model, output: Path) -> tuple[Plan, Any]:
    hardware = pretend(probe(), gpu=None, vram=card.vram, ram=card.ram)
    request = Request(
        prompt="x",
        output=output,
        report=output.with_suffix(".json"),
        quantization=card.quantization,
        attention=card.attention,
        size=card.size,
        frames=card.frames,
        steps=card.steps,
        cfg=1.0,
        seed=1,
        # One step of each expert where there are two.
        boundary=0.95 if model.experts == 2 else None,
    )
    return make_plan(request, model, hardware, _proved()), hardware


def _proved() -> Evidence:
    """Every row as if its self-test had passed: those take time, and are not what is measured."""
    names = [row.name for row in (*ROWS, *LINEAR_ROWS, *block_rows())]
    passed = {
        name: SelfTest(implementation=name, error=0.0, limit=1.0, milliseconds=1.0)
        for name in names
    }
    return Evidence(tests=passed)


@contextmanager
def _attending(card: Card, model: Model) -> Iterator[None]:
    """Only some of the blocks attend, the first among them: the others' result is their Q."""
    if card.attending is None:
        yield
        return
    every = max(1, model.layers // card.attending)
    attend, attend_prepared = Attention.attend, Attention.attend_prepared

    def some(self: Any, q: Any, k: Any, v: Any, layer: int) -> Any:
        return q if layer % every else attend(self, q, k, v, layer)

    def some_prepared(self: Any, prepared: Any, out: Any, layer: int) -> Any:
        return out.zero_() if layer % every else attend_prepared(self, prepared, out, layer)

    with (
        mock.patch.object(Attention, "attend", some),
        mock.patch.object(Attention, "attend_prepared", some_prepared),
    ):
        yield


def with_layers(model: Model, layers: int) -> Model:
    fewer = (model.layers - layers) * block_parameters(model)
    return replace(model, layers=layers, parameters=model.parameters - fewer)
