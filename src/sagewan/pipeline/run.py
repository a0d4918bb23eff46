"""A whole run: prepare (refuse, decide) and execute (load, encode, denoise, decode, write)."""

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan.errors import RejectedError
from sagewan.pipeline.decide import Decision, decide
from sagewan.pipeline.export import Video, metadata_of, write_video
from sagewan.pipeline.files import check_outputs, check_space, written_whole
from sagewan.pipeline.guard import FrameGuard
from sagewan.pipeline.measure import peak_device_bytes, peak_host_bytes, start_measuring
from sagewan.pipeline.progress import DECIDE, Watch
from sagewan.pipeline.report import (
    Change,
    Measured,
    attention_facts,
    cache_facts,
    make_report,
    output_facts,
    planned_changes,
    software,
    weights_facts,
    write_report,
)
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request
from sagewan.plan.serialize import plan_to_json, settings_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

    from sagewan.attention.launch import Launcher
    from sagewan.pipeline.build import Components
    from sagewan.pipeline.loaded import Loaded

logger = logging.getLogger(__name__)

# A seed that is short enough to be typed again.
_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is decided and was not refused; nothing heavy is loaded, nothing written."""

    decision: Decision
    pictures: Mapping[str, "Image"]

    @property
    def plan(self) -> Plan:
        return self.decision.plan


@dataclass(frozen=True, kw_only=True)
class Result:
    """A video on the disk: the last plan of its run, and what report.json says of it."""

    path: Path
    plan: Plan
    report: Mapping[str, Any]


def generate(request: Request, *, watch: Watch | None = None) -> Result:
    """Make a video. ``watch`` is told of the progress and can cancel.

    Raises RequestError for what the request has wrong, before anything is loaded or written;
    UnsupportedError where ``strict`` forbids what this machine would need; RejectedError for a
    result that is not finite, black or constant (kept as NAME.rejected.mp4); Cancelled.
    """
    watch = watch or Watch()
    return execute(prepare(request, watch), watch)


def with_seed(request: Request) -> Request:
    """The request with a seed: its own, or one drawn now."""
    if request.seed is not None:
        return request
    return replace(request, seed=secrets.randbelow(_SEEDS))


def prepare(request: Request, watch: Watch, *, loaded: "Loaded | None" = None) -> Prepared:
    """Refuse what is wrong and decide the rest; a seed is drawn if none is given. What
    is ``loaded`` counts as free memory of the machine: it will be used, or given back."""
    from sagewan.checkpoint.find import find_model
    from sagewan.checkpoint.lora import find_loras
    from sagewan.pipeline.pictures import load_picture
    from sagewan.pipeline.probe import probe

    watch.stage(DECIDE)
    request = with_seed(request)
    check_outputs(request)
    model = find_model(request.model)
    loras = find_loras(request.lora, model)
    hardware = loaded.without_own(probe()) if loaded else probe()
    # What is wrong with the request shows in a draft, before the self-tests take their time.
    draft = make_plan(request, model, hardware, Evidence(), loras)
    check_space(request.output, draft.size, draft.frames)
    paths = {"image": request.image, "last_image": request.last_image}
    pictures = {
        name: load_picture(path, draft.grid_size, name) for name, path in paths.items() if path
    }
    decision = decide(request, model, hardware, loras, watch=watch)
    for change in planned_changes(decision.plan):
        logger.warning("%s", change.sentence())
    return Prepared(decision=decision, pictures=pictures)


def execute(prepared: Prepared, watch: Watch, *, loaded: "Loaded | None" = None) -> Result:
    """Load, encode, denoise, decode and write, with the models that are kept, if any are.
    Raises as :func:`generate`."""
    from sagewan.pipeline.libraries import import_libraries
    from sagewan.pipeline.recover import out_of_memory

    watch.planned(prepared.plan)
    watch.stage("load")
    import_libraries()
    from sagewan.attention.launch import is_out_of_memory
    from sagewan.attention.resolve import one_line
    from sagewan.pipeline.loaded import Loaded

    try:
        return _execute(prepared, watch, loaded or Loaded(keeps=False))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(prepared.plan, one_line(error)) from error


def _execute(prepared: Prepared, watch: Watch, loaded: "Loaded") -> Result:
    from sagewan.attention.launch import Launcher
    from sagewan.pipeline.build import build
    from sagewan.pipeline.conditions import conditions_key
    from sagewan.pipeline.preview import preview_of
    from sagewan.pipeline.recover import LatentsRejectedError, Recovery

    plan = prepared.plan
    launcher = Launcher()
    start_measuring(plan.device)
    components = build(plan, launcher, loaded, watch)
    watch.stage("encode")
    recovery = Recovery(prepared.decision, components, watch)
    conditions = loaded.conditions(conditions_key(plan), lambda: recovery.encode(prepared.pictures))
    if watch.is_viewed:
        watch.draw_with(preview_of(components, plan))
    wrong: str | None = None
    try:
        latents = recovery.denoise(conditions)
    except LatentsRejectedError as error:
        latents, wrong = error.latents, str(error)
    changes = (*planned_changes(plan), *recovery.changes)

    def deliver(plan: Plan) -> Result:
        notes = tuple(recovery.memory_notes)
        run = _Run(prepared, plan, components, launcher, changes, notes)
        return run.deliver(latents, watch, wrong)

    return recovery.surviving("decode", deliver)


@dataclass(frozen=True)
class _Run:
    """A denoised run, on its way to the disk."""

    prepared: Prepared
    plan: Plan
    components: "Components"
    launcher: "Launcher"
    changes: tuple[Change, ...]
    memory_notes: tuple[str, ...]

    def deliver(self, latents: "torch.Tensor", watch: Watch, wrong: str | None) -> Result:
        """Decode and write the video, look at it, and report.

        ``wrong`` is why the latents are rejected already. Whatever is rejected is kept aside, with
        its settings in it, and reported as well; then RejectedError is raised.
        """
        from sagewan.pipeline.decode import decode

        request = self.plan.request
        watch.stage("decode", self.plan.frames)
        guard = FrameGuard()
        frames = decode(self.components, self.plan, latents, guard)
        with written_whole(request.output) as partial:
            video = write_video(
                partial, _watched(frames, guard, watch), fps=self.plan.fps, metadata=self._tags()
            )
            kept = request.output.with_suffix(f".rejected{request.output.suffix}")
            if wrong:
                wrong = f"{wrong}; the last finite latents are kept as {kept}"
            elif seen := guard.objection():
                wrong = (
                    f"the video is {seen}: kept as {kept}, not as a result; try another seed, "
                    "--attention sdpa or --dtype float32"
                )
            if wrong:
                partial.replace(kept)
                self._report(watch, video, kept, rejected=True)
                raise RejectedError(wrong)
        report = self._report(watch, video, request.output, rejected=False)
        return Result(path=request.output, plan=self.plan, report=report)

    def _measured(self) -> Measured:
        return Measured(
            ran=tuple(self.launcher.ran()),
            forwards=self.components.forwards,
            masked_calls=self.launcher.masked_calls,
            weight_bytes=self.components.weight_bytes,
            formats=self.components.formats,
            multiplied=tuple(self.components.multiplier.ran()),
            blocks=tuple(self.components.blocks.ran()),
            peak_device_bytes=peak_device_bytes(self.plan.device),
            peak_host_bytes=peak_host_bytes(),
            pinned_bytes=self.components.pinned_bytes,
            unpinned_blocks=self.components.unpinned_blocks,
            memory_notes=(*self.memory_notes, *self.components.refusals),
        )

    def _tags(self) -> dict[str, str]:
        request = self.plan.request
        if not request.metadata:
            return {}
        facts = {
            "plan": plan_to_json(self.plan),
            "attention": attention_facts(self.plan, self.changes, self._measured()),
            "cache": cache_facts(self.plan, self._measured()),
            "weights": weights_facts(self.plan, self.changes, self._measured()),
            "software": software(self.prepared.decision.hardware),
        }
        summary = (
            f"{request.prompt} (sagewan, {self.plan.model.name}, "
            f"attention {self.plan.attention.main.mode}, seed {self.plan.seed})"
        )
        return metadata_of(settings_of(self.plan), facts, summary)

    def _report(self, watch: Watch, video: Video, path: Path, *, rejected: bool) -> dict[str, Any]:
        """The report of a video that lies at ``path``; written where the request wants it."""
        hardware = self.prepared.decision.hardware
        report = make_report(self.plan, hardware, self.changes, self._measured(), watch.timings())
        report["output"] = output_facts(path, video, rejected=rejected)
        if self.plan.request.report:
            write_report(self.plan.request.report, report)
        return report


def _watched(
    frames: "Iterable[NDArray[np.uint8]]", guard: FrameGuard, watch: Watch
) -> "Iterator[NDArray[np.uint8]]":
    """The frames as they pass the guard; each is a step of the watch."""
    for done, frame in enumerate(frames, start=1):
        guard.see(frame)
        yield frame
        watch.step(done)
