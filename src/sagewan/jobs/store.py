"""Jobs in one SQLite file, which several processes may read and write at once."""

import contextlib
import json
import os
import platform
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from platformdirs import user_data_path

from sagewan.errors import RequestError, StateError
from sagewan.jobs.states import NEXT, State
from sagewan.plan.request import Request
from sagewan.plan.serialize import request_from_json, request_to_json

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL, started REAL, finished REAL,
    state TEXT NOT NULL,
    request TEXT NOT NULL, plan TEXT, report TEXT, error TEXT,
    cancel INTEGER NOT NULL DEFAULT 0,
    host TEXT, pid INTEGER, pid_started REAL
);
CREATE TABLE IF NOT EXISTS events (
    job INTEGER NOT NULL REFERENCES jobs (id),
    at REAL NOT NULL, stage TEXT NOT NULL, done INTEGER NOT NULL, total INTEGER
);
CREATE INDEX IF NOT EXISTS events_of_job ON events (job);
"""
# Seconds to wait for another process to finish its transaction.
_BUSY = 5.0
# Seconds by which two readings of one process's start may differ; the boot is told in whole ones.
_SAME_START = 2.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One record. Times are seconds since 1970; ``plan`` and ``report`` the JSON of the run."""

    id: int
    created: float
    started: float | None
    finished: float | None
    state: State
    request: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    error: str | None
    cancel: bool

    def to_request(self) -> Request:
        """The request as a value. RequestError if a newer version wrote it."""
        return request_from_json(self.request)


@dataclass(frozen=True)
class JobEvent:
    """A job reached ``done`` of ``total`` steps of a stage at a time (seconds since 1970)."""

    at: float
    stage: str
    done: int
    total: int | None


def default_path() -> Path:
    """Where the command line and the app keep their jobs: ``SAGEWAN_DATA``, or the user's data."""
    chosen = os.environ.get("SAGEWAN_DATA")
    folder = Path(chosen).expanduser() if chosen else user_data_path("sagewan", False)
    return folder / "jobs.sqlite"


class Store:
    """The jobs of one file. A connection, so one per thread; sqlite3.Error if it can't be used."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: each change of state is one statement, checked by the row it changed.
        self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._refuse_newer()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_TABLES)
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            self.fail_abandoned()
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
        """A new job in the queue; its number."""
        cursor = self._db.execute(
            "INSERT INTO jobs (created, state, request) VALUES (?, ?, ?)",
            (time.time(), State.QUEUED, json.dumps(request_to_json(request))),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def start(self, job: int) -> None:
        """This process runs the job from now on."""
        process = psutil.Process()
        self._move(
            job,
            State.RUNNING,
            started=time.time(),
            host=platform.node(),
            pid=process.pid,
            pid_started=_started(process),
        )

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
        self._move(job, state, finished=time.time(), report=text, error=error)

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

    def add_event(self, job: int, stage: str, done: int, total: int | None) -> None:
        """The job reached a stage, or a step of it."""
        self._db.execute(
            "INSERT INTO events (job, at, stage, done, total) VALUES (?, ?, ?, ?, ?)",
            (job, time.time(), stage, done, total),
        )

    def job(self, job: int) -> Job:
        """One record. RequestError if there is none of that number."""
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        if row is None:
            raise RequestError(f"job={job}: there is none of that number; see sagewan jobs list")
        return _job(row)

    def jobs(self, limit: int = 20) -> list[Job]:
        """The latest records, the newest first."""
        rows = self._db.execute("SELECT * FROM jobs ORDER BY id DESC LIMIT ?", (limit,))
        return [_job(row) for row in rows]

    def events(self, job: int) -> list[JobEvent]:
        """What was noted of a job, in order."""
        rows = self._db.execute(
            "SELECT at, stage, done, total FROM events WHERE job = ? ORDER BY rowid", (job,)
        )
        return [JobEvent(*row) for row in rows]

    def _refuse_newer(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise sqlite3.DatabaseError("a newer version of sagewan wrote it")

    def fail_abandoned(self) -> None:
        """Jobs whose process died without a word are failed, so that none runs for ever."""
        rows = self._db.execute(
            "SELECT id, pid, pid_started FROM jobs WHERE state = ? AND host = ?",
            (State.RUNNING, platform.node()),
        ).fetchall()
        for row in rows:
            if not _alive(row["pid"], row["pid_started"]):
                # Another process may have seen it first.
                with contextlib.suppress(StateError):
                    self.finish(row["id"], State.FAILED, error="its process ended unexpectedly")

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


def _alive(pid: int, started: float) -> bool:
    # A number is given again to another process, which then began at another time.
    try:
        return abs(_started(psutil.Process(pid)) - started) < _SAME_START
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _started(process: psutil.Process) -> float:
    """When a process began, in seconds, the same however the clock is set in between."""
    # Linux counts from the boot, and psutil adds the time of the boot by the clock of now.
    boot = psutil.boot_time() if psutil.LINUX else 0.0
    return float(process.create_time() - boot)


def _job(row: sqlite3.Row) -> Job:
    def parsed(column: str) -> Any:
        return None if row[column] is None else json.loads(row[column])

    return Job(
        id=row["id"],
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        state=State(row["state"]),
        request=parsed("request"),
        plan=parsed("plan"),
        report=parsed("report"),
        error=row["error"],
        cancel=bool(row["cancel"]),
    )
