"""Measures what MagCache goes by: one video is denoised, and of each step it is noted how much its
blocks add, against the step before. No video is written."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sagewan.cache import cache_folder
from sagewan.errors import RequestError, UnsupportedError
from sagewan.pipeline.decide import decide
from sagewan.pipeline.magnitudes import store_magnitudes
from sagewan.pipeline.progress import DECIDE, Watch
from sagewan.plan.plan import Plan
from sagewan.plan.request import Request
from sagewan.plan.step_cache import MAG, Magnitudes, StepCache, plan_cache

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# Its authors' for Wan.
USUAL = StepCache(method=MAG, threshold=0.06)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What was measured, for which plan, where it is kept, and which steps (from 0) the ``cache``
    that was asked for would reuse."""

    plan: Plan
    cache: StepCache
    magnitudes: Magnitudes
    path: Path
    reused: tuple[int, ...]


def calibrate(request: Request, watch: Watch) -> Calibrated:
    """Measure the request's model for its steps, by one plan throughout: nothing is made again.
    Raises as generate does, RequestError for a cache that goes by no measurements or where they
    can't be kept, and UnsupportedError where an implementation fails."""
    from sagewan.checkpoint.find import find_model
    from sagewan.checkpoint.lora import find_loras
    from sagewan.pipeline.pictures import load_picture
    from sagewan.pipeline.probe import probe

    watch.stage(DECIDE)
    cache = _asked(request)
    if request.sparsity:
        logger.warning(
            "sparsity %s is left out: a step cache is measured with dense attention",
            request.sparsity,
        )
    # What is reused is not measured.
    request = replace(request, cache=cache, sparsity=None)
    model = find_model(request.model)
    loras = find_loras(request.lora, model)
    decision = decide(request, model, probe(), loras, watch=watch, calibrating=True)
    plan = replace(decision.plan, cache=None)
    paths = {"image": request.image, "last_image": request.last_image}
    pictures = {
        name: load_picture(path, plan.grid_size, name) for name, path in paths.items() if path
    }
    magnitudes = _measured(plan, pictures, watch)
    planned = plan_cache(cache, plan.steps.passes, magnitudes)
    with disk_told():
        path = store_magnitudes(plan, magnitudes)
    reused = planned.reused if planned and planned.reused else ()
    return Calibrated(plan=plan, cache=cache, magnitudes=magnitudes, path=path, reused=reused)


def _asked(request: Request) -> StepCache:
    """The cache to measure for, whatever it recorded of an earlier run."""
    if request.cache is None:
        return USUAL
    if request.cache.method != MAG:
        raise RequestError(
            f"cache={request.cache}: {request.cache.method} goes by no measurements; leave it out, "
            f"or name the one that does, such as {USUAL}"
        )
    return replace(request.cache, recorded=None)


def _measured(plan: Plan, pictures: "Mapping[str, Image]", watch: Watch) -> Magnitudes:
    from sagewan.pipeline.libraries import import_libraries

    watch.planned(plan)
    watch.stage("load")
    import_libraries()
    with stops_told(plan):
        return _denoised(plan, pictures, watch)


@contextmanager
def disk_told() -> Iterator[None]:
    """A block that keeps what was measured; where the system refuses that, it is one sentence."""
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"what was measured can't be kept in {cache_folder()} ({error.strerror or error}): "
            "make room, or set SAGEWAN_CACHE to another folder"
        ) from error


@contextmanager
def stops_told(plan: Plan) -> Iterator[None]:
    """A block in which what breaks a run off, that is not made again, is one sentence."""
    from sagewan.attention.launch import is_out_of_memory
    from sagewan.attention.resolve import one_line
    from sagewan.pipeline.denoise import NoMemory, NotFinite, RowFailed
    from sagewan.pipeline.recover import out_of_memory, rejected

    try:
        yield
    except NotFinite as stop:
        raise rejected(plan, stop) from stop
    except RowFailed as stop:
        failure = stop.failure
        raise UnsupportedError(
            f"{failure.implementation} failed: {failure.objection.sentence()}; choose another "
            "--attention"
        ) from failure
    except NoMemory as stop:
        raise out_of_memory(plan, stop.what, "denoise") from stop
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(plan, one_line(error)) from error


def _denoised(plan: Plan, pictures: "Mapping[str, Image]", watch: Watch) -> Magnitudes:
    from sagewan.attention.launch import Launcher
    from sagewan.model.residuals import Measuring
    from sagewan.pipeline.build import build
    from sagewan.pipeline.conditions import encode
    from sagewan.pipeline.denoise import denoise
    from sagewan.pipeline.step_cache import PROMPT

    components = build(plan, Launcher(), watch=watch)
    watch.stage("encode")
    conditions = encode(components, plan, pictures)
    measuring = Measuring(PROMPT)
    denoise(components, plan, conditions, watch, residuals=measuring)
    return tuple(measuring.magnitudes)
