"""Jobs in one SQLite file, which several processes may read and write at once."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sagewan.errors import RequestError, StateError
from sagewan.jobs.processes import Process
from sagewan.jobs.records import Job, JobEvent, job_of, prepare_tables
from sagewan.jobs.states import NEXT, State
from sagewan.plan.request import Request
from sagewan.plan.serialize import request_to_json

# Seconds to wait for another process to finish its transaction.
_BUSY = 5.0
# A job of the queue whose process died is tried once more; a second death is its own doing.
MAX_ATTEMPTS = 2
_DIED = "its process ended unexpectedly"


class Store:
    """The jobs of one file. A connection, so one per thread; sqlite3.Error if it can't be used."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: each change of state is one statement, checked by the row it changed.
        self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            prepare_tables(self._db)
            self.settle_abandoned()
        except sqlite3.Error:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._db.close()

    def add(self, request: Request) -> int:
        """A new job that its own process will start; its number."""
        cursor = self._db.execute(
            "INSERT INTO jobs (created, state, request) VALUES (?, ?, ?)",
            (time.time(), State.QUEUED, json.dumps(request_to_json(request))),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def start(self, job: int) -> None:
        """This process runs the job from now on."""
        process = Process.this()
        self._move(
            job,
            State.RUNNING,
            started=time.time(),
            host=process.host,
            pid=process.pid,
            pid_started=process.started,
        )
        self._db.execute("UPDATE jobs SET attempts = attempts + 1 WHERE id = ?", (job,))

    def finish(
        self,
        job: int,
        state: State,
        *,
        report: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """The job ended. Raises StateError if it was not running."""
        text = None if report is None else json.dumps(report)
        self._move(
            job,
            state,
            only_from=State.RUNNING,
            finished=time.time(),
            report=text,
            error=error,
        )
        self._db.execute("DELETE FROM previews WHERE job = ?", (job,))

    def cancel(self, job: int) -> State:
        """Take a job out of the queue, or ask the process that runs it to stop; its state then.

        Raises StateError for a job that has ended, RequestError for one that is not there.
        """
        try:
            self._move(job, State.CANCELLED, only_from=State.QUEUED, finished=time.time())
        except StateError:
            state = self.job(job).state
            if state is not State.RUNNING:
                raise
            self._db.execute("UPDATE jobs SET cancel = 1 WHERE id = ?", (job,))
            return state
        return State.CANCELLED

    def cancel_asked(self, job: int) -> bool:
        """Whether another process asked for this job's end."""
        row = self._db.execute("SELECT cancel FROM jobs WHERE id = ?", (job,)).fetchone()
        return bool(row and row["cancel"])

    def set_plan(self, job: int, plan: Mapping[str, Any]) -> None:
        """The plan that the job runs by; a later one replaces it."""
        self._db.execute("UPDATE jobs SET plan = ? WHERE id = ?", (json.dumps(plan), job))

    def add_event(self, job: int, event: JobEvent) -> None:
        """The job reached a stage, or a step of it."""
        self._db.execute(
            "INSERT INTO events (job, at, stage, done, total, part, seconds, seconds_left, memory) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                job,
                event.at,
                event.stage,
                event.done,
                event.total,
                event.part,
                event.seconds,
                event.seconds_left,
                event.memory,
            ),
        )

    def add_log(self, job: int, text: str) -> None:
        """One more line, or several, of what is said while the job runs."""
        self._db.execute("UPDATE jobs SET log = log || ? WHERE id = ?", (text + "\n", job))

    def job(self, job: int) -> Job:
        """One record. RequestError if there is none of that number."""
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is None:
            raise RequestError(f"job={job}: there is none of that number; see sagewan jobs list")
        return job_of(row)

    def jobs(self, limit: int = 20) -> list[Job]:
        """The latest records, the newest first."""
        rows = self._db.execute("SELECT * FROM jobs ORDER BY id DESC LIMIT ?", (limit,))
        return [job_of(row) for row in rows]

    def events(self, job: int) -> list[JobEvent]:
        """What was noted of a job, in order."""
        rows = self._db.execute(
            "SELECT at, stage, done, total, part, seconds, seconds_left, memory "
            "FROM events WHERE job = ? ORDER BY rowid",
            (job,),
        )
        return [JobEvent(*row) for row in rows]

    def settle_abandoned(self) -> None:
        """Jobs whose process died without a word don't run for ever: one of the queue goes back to
        it, once; any other is failed, and one that was to be cancelled is."""
        rows = self._db.execute(
            "SELECT id, host, pid, pid_started, cancel, owner, attempts FROM jobs WHERE state = ?",
            (State.RUNNING,),
        ).fetchall()
        for row in rows:
            process = Process(row["host"], row["pid"], row["pid_started"])
            if process.is_here and not process.alive:
                # Another process may have seen it first.
                with contextlib.suppress(StateError):
                    self._settle(row)

    def _settle(self, row: sqlite3.Row) -> None:
        if row["cancel"]:
            self.finish(row["id"], State.CANCELLED)
        elif row["owner"] is not None and row["attempts"] < MAX_ATTEMPTS:
            self._move(row["id"], State.QUEUED, only_from=State.RUNNING)
        else:
            twice = ", twice" if row["attempts"] >= MAX_ATTEMPTS else ""
            self.finish(row["id"], State.FAILED, error=_DIED + twice)

    def _move(
        self, job: int, state: State, *, only_from: State | None = None, **values: object
    ) -> None:
        """Change the state and what goes with it in one statement, or raise StateError."""
        sources = [only_from] if only_from else [s for s in State if state in NEXT[s]]
        columns = {"state": state, **values}
        assignments = ", ".join(f"{column} = ?" for column in columns)
        places = ", ".join("?" for _ in sources)
        # The names of columns are this file's own; every value is bound.
        cursor = self._db.execute(
            f"UPDATE jobs SET {assignments} WHERE id = ? AND state IN ({places})",  # noqa: S608
            (*columns.values(), job, *sources),
        )
        if cursor.rowcount != 1:
            raise StateError(f"job {job} is {self.job(job).state} and can't become {state}")
