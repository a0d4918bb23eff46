"""The process that makes the videos of the queue, one after the other, its models kept loaded."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from sagewan.errors import StateError
from sagewan.jobs.queue import Queue
from sagewan.jobs.run import run_claimed
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.session import Session

logger = logging.getLogger(__name__)

# Seconds between two looks at an empty queue.
IDLE = 0.25
# Videos are made on one device for now: one worker a machine.
_SEAT = "auto"


def work(
    path: Path,
    stop: threading.Event,
    *,
    until_empty: bool = False,
    watch_of: Callable[[], Watch] = Watch,
) -> None:
    """Run the jobs of the queue in ``path`` until ``stop`` is set, or none is left.

    A job under way is then given back to the queue within one transformer block. Each job runs
    under a watch of ``watch_of``. An unforeseen error ends its job, not the worker. Raises
    StateError if another process already works on this queue.
    """
    with Queue(path) as queue, Session() as session:
        if not queue.take_seat(_SEAT):
            raise StateError(
                "another process already works on this queue: end it, or let it do the work"
            )
        try:
            while not stop.is_set():
                queue.settle_abandoned()
                job = queue.claim()
                if job is None and until_empty:
                    return
                if job is None:
                    stop.wait(IDLE)
                    continue
                try:
                    run_claimed(queue, job, session, watch_of(), stop.is_set)
                except Exception:
                    logger.exception("job %s ended by an unforeseen error", job.id)
        finally:
            queue.leave_seat(_SEAT)
