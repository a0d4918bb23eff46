"""Runs a request with its record kept: the one way from a job to a video."""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sagewan.errors import Cancelled, SagewanError, StateError
from sagewan.jobs.states import State
from sagewan.jobs.store import Store
from sagewan.pipeline.progress import Event, Watch
from sagewan.pipeline.run import Prepared, Result, execute
from sagewan.plan.request import Request
from sagewan.plan.serialize import plan_to_json

if TYPE_CHECKING:
    from sagewan.pipeline.session import Session

logger = logging.getLogger(__name__)

# Steps come faster than anyone reads them; stages are always noted.
_NOTE_INTERVAL = 1.0


def run_job(
    store: Store, prepared: Prepared, watch: Watch, *, session: "Session | None" = None
) -> Result:
    """Record and execute a run, with the models of a session if there is one; how it ends is in
    the record, and raised as well.

    The record never stops the run, unless someone cancelled it there: if the database fails under
    way, a warning is logged and the video is made.
    """
    record = _Record(store, prepared.plan.request)
    watch.listen(record.note)
    watch.stop_when(record.cancel_asked)
    try:
        result = execute(prepared, watch, session=session)
    except (Cancelled, KeyboardInterrupt):
        record.finish(State.CANCELLED)
        raise
    except SagewanError as error:
        record.finish(State.FAILED, error=str(error))
        raise
    except BaseException as error:
        record.finish(State.FAILED, error=f"{type(error).__name__}: {error}")
        raise
    record.finish(State.DONE, result=result)
    return result


class _Record:
    """The record of one running job; after a first failure of the database it is silent."""

    def __init__(self, store: Store, request: Request) -> None:
        self._store = store
        self._broken = False
        self._stage: str | None = None
        self._noted = 0.0
        self._id = 0
        with self._tolerated():
            self._id = store.add(request)
            try:
                store.start(self._id)
            except StateError:
                raise Cancelled("cancelled while it was queued") from None

    def note(self, event: Event) -> None:
        """A listener of the watch: plans and stages as they come, steps once a second."""
        if self._broken:
            return
        now = time.monotonic()
        with self._tolerated():
            if event.plan is not None:
                self._store.set_plan(self._id, plan_to_json(event.plan))
            elif event.stage != self._stage or now - self._noted >= _NOTE_INTERVAL:
                self._stage, self._noted = event.stage, now
                self._store.add_event(self._id, event.stage, event.done, event.total)

    def cancel_asked(self) -> bool:
        """Whether someone asked, through the database, for this job's end."""
        asked = False
        if not self._broken:
            with self._tolerated():
                asked = self._store.cancel_asked(self._id)
        return asked

    def finish(
        self, state: State, *, result: Result | None = None, error: str | None = None
    ) -> None:
        """The last word."""
        if not self._broken:
            with self._tolerated():
                report = result.report if result else None
                self._store.finish(self._id, state, report=report, error=error)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        # A StateError: another process took this one for dead, as two containers with one name
        # and one folder do, and closed the record.
        except (sqlite3.Error, StateError) as error:
            self._broken = True
            logger.warning("the record of this job can't be kept: %s", error)
