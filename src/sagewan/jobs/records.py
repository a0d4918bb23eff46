"""What the file of jobs holds, as values; its tables, and how an older file becomes this one."""

import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from sagewan.jobs.states import State
from sagewan.plan.request import Request
from sagewan.plan.serialize import request_from_json

SCHEMA = 3
TABLES = """
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
# What each schema added to the one before it.
UPGRADES: Mapping[int, str] = {
    2: """
ALTER TABLE jobs ADD COLUMN owner TEXT;
ALTER TABLE jobs ADD COLUMN place REAL;
ALTER TABLE jobs ADD COLUMN variants TEXT;
ALTER TABLE jobs ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN log TEXT NOT NULL DEFAULT '';
ALTER TABLE events ADD COLUMN part TEXT;
ALTER TABLE events ADD COLUMN seconds REAL NOT NULL DEFAULT 0;
ALTER TABLE events ADD COLUMN seconds_left REAL;
ALTER TABLE events ADD COLUMN memory INTEGER;
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE previews (job INTEGER PRIMARY KEY, step INTEGER NOT NULL, image BLOB NOT NULL);
CREATE TABLE workers (
    device TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, pid_started REAL NOT NULL
);
""",
    3: "CREATE TABLE drafts (owner TEXT PRIMARY KEY, form TEXT NOT NULL)",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One record. Times are seconds since 1970; ``plan`` and ``report`` the JSON of the run.

    ``owner`` is who put it into the queue, None for a run of the command line, which never waits;
    ``variants`` are the settings that a comparison tries, None for a single video; ``attempts``
    how often it was started; ``log`` what was said while it ran.
    """

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
    owner: str | None
    variants: tuple[Mapping[str, Any], ...] | None
    attempts: int
    log: str

    def to_request(self) -> Request:
        """The request as a value. RequestError if a newer version wrote it."""
        return request_from_json(self.request)


@dataclass(frozen=True)
class JobEvent:
    """A job reached ``done`` of ``total`` steps of a stage at a time (seconds since 1970).

    ``seconds`` is the time since the stage began, ``seconds_left`` the estimate of its rest;
    ``memory`` the bytes its device held; ``part`` which variant of a comparison it is.
    """

    at: float
    stage: str
    done: int
    total: int | None
    part: str | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    memory: int | None = None


def default_path() -> Path:
    """Where the command line and the app keep their jobs: ``SAGEWAN_DATA``, or the user's data."""
    chosen = os.environ.get("SAGEWAN_DATA")
    folder = Path(chosen).expanduser() if chosen else user_data_path("sagewan", False)
    return folder / "jobs.sqlite"


def prepare_tables(db: sqlite3.Connection) -> None:
    """Make the tables, or bring older ones to this schema; all of it or nothing.

    Raises sqlite3.DatabaseError for a file that a newer version wrote.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA:
        raise sqlite3.DatabaseError("a newer version of sagewan wrote it")
    if version == SCHEMA:
        return
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have done it while this one waited.
        (version,) = db.execute("PRAGMA user_version").fetchone()
        upgrades = (text for made, text in UPGRADES.items() if made > version)
        if version < SCHEMA:
            for statement in ";".join((TABLES, *upgrades)).split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("COMMIT")
    except sqlite3.Error:
        db.execute("ROLLBACK")
        raise


def job_of(row: sqlite3.Row) -> Job:
    """A row of the table as a value."""

    def parsed(column: str) -> Any:
        return None if row[column] is None else json.loads(row[column])

    variants = parsed("variants")
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
        owner=row["owner"],
        variants=None if variants is None else tuple(variants),
        attempts=row["attempts"],
        log=row["log"],
    )
