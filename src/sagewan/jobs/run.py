"""Runs a request with its record kept: the one way from a job to a video."""

import contextlib
import logging
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sagewan.errors import Cancelled, SagewanError, StateError
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import Job, JobEvent
from sagewan.jobs.states import State
from sagewan.jobs.store import Store
from sagewan.pipeline.compare import compare, variants_of
from sagewan.pipeline.measure import device_bytes
from sagewan.pipeline.progress import Event, Watch
from sagewan.pipeline.run import Prepared, Result, execute
from sagewan.plan.plan import Plan
from sagewan.plan.serialize import plan_to_json

if TYPE_CHECKING:
    from sagewan.pipeline.session import Session

logger = logging.getLogger(__name__)

# Steps come faster than anyone reads them; stages are always noted.
_NOTE_INTERVAL = 0.5


def run_job(
    store: Store, prepared: Prepared, watch: Watch, *, session: "Session | None" = None
) -> Result:
    """Record and execute a run, with the models of a session if there is one; how it ends is in
    the record, and raised as well.

    The record never stops the run, unless someone cancelled it there: if the database fails under
    way, a warning is logged and the video is made.
    """
    record = Record(store)
    with record.tolerated():
        record.job = store.add(prepared.plan.request)
        try:
            store.start(record.job)
        except StateError:
            raise Cancelled("cancelled while it was queued") from None
    with record.kept(watch):
        result = execute(prepared, watch, loaded=session)
        record.report = result.report
    return result


def run_claimed(
    queue: Queue, job: Job, session: "Session", watch: Watch, stopping: Callable[[], bool]
) -> None:
    """Run a job that was claimed from the queue, to its end, which is in the record; an unforeseen
    error is raised as well.

    ``stopping`` says whether a cancellation was meant for the worker: then the job goes back.
    """
    record = Record(queue, job.id)
    record.stopping = stopping
    watch.show_to(record.show)
    with contextlib.suppress(Cancelled, SagewanError), record.kept(watch):
        request = job.to_request()
        if job.variants is None:
            record.report = session.generate(request, watch=watch).report
        else:
            variants = variants_of(request, job.variants)
            record.report = compare(variants, loaded=session, watch=watch).to_json()


class Record:
    """The record of one running job; after a first failure of the database it is silent."""

    def __init__(self, store: Store, job: int = 0) -> None:
        self.job = job
        self.report: Mapping[str, Any] | None = None
        self.stopping: Callable[[], bool] = lambda: False
        self._store = store
        self._broken = False
        self._stage: tuple[str | None, str] | None = None
        self._noted = 0.0
        self._plan: Plan | None = None

    @contextlib.contextmanager
    def kept(self, watch: Watch) -> Iterator[None]:
        """Note what happens in the block, what is logged in it, and how it ends."""
        watch.listen(self.note)
        watch.stop_when(self.cancel_asked)
        try:
            with _logged(self._log):
                yield
        except (Cancelled, KeyboardInterrupt):
            self._finish(State.QUEUED if self.stopping() else State.CANCELLED)
            raise
        except SagewanError as error:
            self._finish(State.FAILED, error=str(error))
            raise
        except BaseException as error:
            self._log(traceback.format_exc())
            self._finish(State.FAILED, error=f"{type(error).__name__}: {error}")
            raise
        self._finish(State.DONE)

    def note(self, event: Event) -> None:
        """A listener of the watch: plans and stages as they come, steps now and then."""
        if self._broken:
            return
        now = time.monotonic()
        stage = (event.part, event.stage)
        with self.tolerated():
            if event.plan is not None:
                self._plan = event.plan
                self._store.set_plan(self.job, plan_to_json(event.plan))
            elif (
                stage != self._stage
                or event.done == event.total
                or now - self._noted >= _NOTE_INTERVAL
            ):
                self._stage, self._noted = stage, now
                self._store.add_event(self.job, self._seen(event))

    def _seen(self, event: Event) -> JobEvent:
        return JobEvent(
            at=time.time(),
            stage=event.stage,
            done=event.done,
            total=event.total,
            part=event.part,
            seconds=event.seconds,
            seconds_left=event.seconds_left,
            memory=device_bytes(self._plan.device) if self._plan else None,
        )

    def show(self, step: int, image: bytes) -> None:
        """A viewer of the watch: keeps the last preview."""
        if not self._broken and isinstance(self._store, Queue):
            with self.tolerated():
                self._store.set_preview(self.job, step, image)

    def cancel_asked(self) -> bool:
        """Whether someone asked, through the database, for this job's end, or its worker's."""
        asked = self.stopping()
        if not asked and not self._broken:
            with self.tolerated():
                asked = self._store.cancel_asked(self.job)
        return asked

    def _log(self, text: str) -> None:
        if not self._broken:
            with self.tolerated():
                self._store.add_log(self.job, text)

    def _finish(self, state: State, *, error: str | None = None) -> None:
        """The last word."""
        if self._broken:
            return
        with self.tolerated():
            if state is State.QUEUED and isinstance(self._store, Queue):
                self._store.give_back(self.job)
            else:
                self._store.finish(self.job, state, report=self.report, error=error)

    @contextlib.contextmanager
    def tolerated(self) -> Iterator[None]:
        """What the database refuses is a warning, once."""
        try:
            yield
        # A StateError: another process took this one for dead, as two containers with one name
        # and one folder do, and closed the record.
        except (sqlite3.Error, StateError) as error:
            self._broken = True
            logger.warning("the record of this job can't be kept: %s", error)


class _Lines(logging.Handler):
    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._take = take
        self._busy = False
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._busy:
            return  # The database's own trouble, which would come here again.
        self._busy = True
        try:
            self._take(self.format(record))
        finally:
            self._busy = False


@contextlib.contextmanager
def _logged(take: Callable[[str], None]) -> Iterator[None]:
    handler = _Lines(take)
    package = logging.getLogger("sagewan")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
