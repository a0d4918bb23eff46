"""``sagewan generate``."""

import argparse
import contextlib
import logging
import signal
import sqlite3
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sagewan.cli.flags import add_request_flags, request_from
from sagewan.cli.show import duration, shown
from sagewan.pipeline.progress import Watch
from sagewan.plan.counted import counted

if TYPE_CHECKING:
    from sagewan.jobs.store import Store
    from sagewan.pipeline.run import Result
    from sagewan.plan.request import Request

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of a request."""
    add_request_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the video, record the run, and say in one line what ran."""
    request = request_from(arguments)
    watch = Watch()
    with stopped_by_signals(watch), shown(watch):
        result = _run(request, watch)
    print(summary(result))
    return 0


def _run(request: "Request", watch: Watch) -> "Result":
    from sagewan.jobs.run import run_job
    from sagewan.pipeline.run import execute, prepare

    # First of all, so that a request that is refused leaves nothing behind, not even a database.
    prepared = prepare(request, watch)
    store = _open_store()
    if store is None:
        return execute(prepared, watch)
    with store:
        return run_job(store, prepared, watch)


def _open_store() -> "Store | None":
    from sagewan.jobs.records import default_path
    from sagewan.jobs.store import Store

    path = default_path()
    try:
        return Store(path)
    except (OSError, sqlite3.Error) as error:
        logger.warning("this run is not recorded: %s can't be used (%s)", path, error)
        return None


def summary(result: "Result") -> str:
    """``ball.mp4: 17 frames 256x256, sdpa (torch.sdpa, flash) 256 of 256 calls, 9.8 s, seed 1``."""
    report = result.report
    ran = report["attention"]["ran"]
    calls = sum(row["calls"] for row in ran)
    rows = []
    for row in ran:
        how = ", ".join(filter(None, (row["implementation"], row["torch_backend"])))
        rows.append(f"{row['mode']} ({how}) {row['calls']} of {calls} calls")
    width, height = report["output"]["size"]
    took = duration(report["timings"]["total"])
    return (
        f"{result.path}: {counted(report['output']['frames'], 'frame')} {width}x{height}, "
        f"{', '.join(rows)}{_asked(report)}{_left_out(report)}{_reused(report)}, {took}, "
        f"seed {result.plan.seed}"
    )


def _left_out(report: Mapping[str, Any]) -> str:
    """``, radial:0.75: 42% of the blocks of keys left out``; nothing without sparsity."""
    sparsity = report["attention"]["sparsity"]
    if sparsity is None:
        return ""
    return f", {sparsity['requested']}: {sparsity['skipped']:.0%} of the blocks of keys left out"


def _reused(report: Mapping[str, Any]) -> str:
    """``, cache easy:0.05: 11 of 32 forwards reused (steps 5, 6, 8)``; nothing without a cache."""
    cache = report["cache"]
    if cache is None:
        return ""
    told = f", cache {cache['requested']}: {cache['reused']} of {cache['forwards']} forwards reused"
    return f"{told} (steps {', '.join(map(str, cache['steps']))})" if cache["steps"] else told


def _asked(report: Mapping[str, Any]) -> str:
    """Whatever gave way to something else, so that nobody overlooks it: the top of each chain of
    fallbacks, since a step between came from one."""
    fallbacks = report["attention"]["fallbacks"]
    between = {step["to"] for step in fallbacks}
    asked = dict.fromkeys(step["from"] for step in fallbacks if step["from"] not in between)
    return f" instead of {', '.join(asked)}" if asked else ""


@contextlib.contextmanager
def stopped_by_signals(watch: Watch) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the block at once, with nothing partial left.

    The interrupt is raised here and now; where a library swallows it, the watch still ends the
    run at its next check, which comes with each transformer block. An impatient second one would
    only disturb the removal of what is partial.
    """
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            watch.cancel()
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    # The terminal was closed. nohup has that ignored, which is to stay so; Windows has no SIGHUP.
    closed = getattr(signal, "SIGHUP", None)
    if closed is not None and signal.getsignal(closed) is not signal.SIG_IGN:
        numbers.append(closed)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
