"""Cases side by side on one GPU: each in a process of its own, as many as the memory given allows.

What all of them import is imported once, before the processes part: it takes longer than many a
case. The parent never touches CUDA, as a process that has can't be parted from.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, cast

# What a process holds of the GPU that does not need it any more: its context.
_IDLE = 0.75
# What a process that is told to stop has to say what it saw, in seconds.
_LAST_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``gib`` of the GPU for all that run at once, at most ``lanes`` of them; ``seconds`` for all
    together."""

    gib: float
    lanes: int
    seconds: float


@dataclass
class _Running:
    name: str
    gib: float
    process: BaseProcess
    began: float = field(default_factory=time.monotonic)


def side_by_side(
    cases: Mapping[str, float], work: Callable[[str], Any], limits: Limits, folder: Path
) -> None:
    """Run ``work(name)`` for each case, in order; the mapping says how many GiB of the GPU it may
    take. One that does not fit beside those that run waits, and smaller ones pass it. Each has what
    it prints in ``folder/NAME.txt``; it is sent SIGTERM when the time is over."""
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    context = _context()
    waiting, running = dict(cases), list[_Running]()
    while waiting or running:
        now = time.monotonic() - begin
        if now > limits.seconds:
            print(f"{now:6.1f} s not begun: {', '.join(waiting) or 'none'}", flush=True)
            _stop(running)
            return
        for one in [one for one in running if one.process.exitcode is not None]:
            running.remove(one)
            given_back(folder, one.name).unlink(missing_ok=True)
            took, code = time.monotonic() - one.began, one.process.exitcode
            print(f"{now:6.1f} s {one.name}: exit code {code} after {took:.1f} s", flush=True)
        for name, gib in list(waiting.items()):
            taken = sum(
                _IDLE if given_back(folder, one.name).exists() else one.gib for one in running
            )
            if len(running) < limits.lanes and (not running or taken + gib <= limits.gib):
                process: Any = context.Process(target=_child, args=(work, name, folder))  # type: ignore[attr-defined]
                process.start()
                running.append(_Running(name, gib, process))
                del waiting[name]
        time.sleep(0.05)


def given_back(folder: Path, name: str) -> Path:
    """The file that a case makes once it does not need the GPU any more."""
    return folder / f"{name}.given-back"


def _child(work: Callable[[str], Any], name: str, folder: Path) -> None:
    # All that it prints, its libraries' words included, belongs to its own file.
    with (folder / f"{name}.txt").open("w", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        work(name)


def _stop(running: list[_Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.join(_LAST_WORDS)
        if one.process.exitcode is None:
            one.process.kill()
            one.process.join()
        print(f"         {one.name}: stopped, exit code {one.process.exitcode}", flush=True)


def _context() -> BaseContext:
    """How processes are made: parted from this one, once all is imported; fresh, if what a library
    did on its import keeps parted ones from the GPU."""
    # Otherwise asking whether there is a GPU calls the driver.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # diffusers imports it where it finds it, and it asks for the GPU's kind as it is imported.
    sys.modules.setdefault("sageattention", cast("ModuleType", None))
    with _no_cuda():
        _import_what_all_need()
    fork = multiprocessing.get_context("fork")
    tried = fork.Process(target=_touch)
    tried.start()
    tried.join(60)
    if tried.exitcode == 0:
        return fork
    tried.kill()
    print("processes are fresh ones: those parted from this one can't use the GPU", flush=True)
    return multiprocessing.get_context("spawn")


@contextmanager
def _no_cuda() -> Iterator[None]:
    """Whoever starts CUDA within the block is named."""
    import torch.cuda

    start = torch.cuda._lazy_init  # noqa: SLF001

    def named() -> None:
        traceback.print_stack(limit=12)
        start()

    torch.cuda._lazy_init = named  # noqa: SLF001
    try:
        yield
    finally:
        torch.cuda._lazy_init = start  # noqa: SLF001


def _touch() -> None:
    import torch

    torch.zeros(1, device="cuda").item()


def _import_what_all_need() -> None:
    import comfy_kitchen  # noqa: F401
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan  # noqa: F401
    from transformers import UMT5EncoderModel  # noqa: F401

    from sagewan.pipeline.libraries import import_libraries

    import_libraries()
