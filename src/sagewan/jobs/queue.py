"""The queue that the app and the command line share: whose turn it is, and who may change what."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sagewan.errors import RequestError, StateError
from sagewan.jobs.processes import Process
from sagewan.jobs.records import Job, job_of
from sagewan.jobs.states import State
from sagewan.jobs.store import Store
from sagewan.plan.request import Request
from sagewan.plan.serialize import request_to_json

# Whose jobs the command line adds; visitors of the app have names of their own.
COMMAND_LINE = "command line"


class Queue(Store):
    """The store with an order. An ``owner`` of None may see and change the jobs of everybody."""

    def enqueue(
        self,
        request: Request,
        owner: str,
        variants: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """A new job for the worker, behind its owner's others; its number. ``variants`` are the
        settings that a comparison tries, JSON as of a request."""
        cursor = self._db.execute(
            "INSERT INTO jobs (created, state, request, owner, variants, place) VALUES "
            "(?, ?, ?, ?, ?, (SELECT COALESCE(MAX(place), 0) + 1 FROM jobs))",
            (
                time.time(),
                State.QUEUED,
                json.dumps(request_to_json(request)),
                owner,
                None if variants is None else json.dumps(list(variants)),
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def waiting(self) -> list[Job]:
        """The queued jobs of everybody in the order they will run: owners take turns, first
        whoever's last start is longest ago."""
        rows = self._db.execute(
            "SELECT * FROM jobs WHERE state = ? AND owner IS NOT NULL ORDER BY place, id",
            (State.QUEUED,),
        )
        lines: dict[str, list[Job]] = defaultdict(list)
        for row in rows:
            lines[row["owner"]].append(job_of(row))
        turns = sorted(lines, key=lambda owner: (self._last_start(owner), lines[owner][0].id))
        lengths = [len(line) for line in lines.values()]
        return [
            lines[owner][turn]
            for turn in range(max(lengths, default=0))
            for owner in turns
            if turn < len(lines[owner])
        ]

    def _last_start(self, owner: str) -> float:
        (last,) = self._db.execute(
            "SELECT MAX(started) FROM jobs WHERE owner = ?", (owner,)
        ).fetchone()
        return last or 0.0

    def claim(self) -> Job | None:
        """Take the job whose turn it is and run it in this process; None if none waits."""
        for job in self.waiting():
            try:
                self.start(job.id)
            except StateError:
                continue  # Another process took it, or it was cancelled just now.
            return self.job(job.id)
        return None

    def give_back(self, job: int) -> None:
        """A job that was stopped for no fault of its own goes back, to run again from its start."""
        self._move(job, State.QUEUED, only_from=State.RUNNING, started=None)
        self._db.execute("UPDATE jobs SET attempts = attempts - 1 WHERE id = ?", (job,))

    def of(
        self, owner: str | None, *states: State, limit: int = 50, compares: bool | None = None
    ) -> list[Job]:
        """The jobs of an owner in any of these states (none: all), the newest first; where
        ``compares`` is said, only comparisons, or none of them."""
        chosen = states or tuple(State)
        places = ", ".join("?" for _ in chosen)
        rows = self._db.execute(
            "SELECT * FROM jobs WHERE owner IS NOT NULL AND (? IS NULL OR owner = ?) "  # noqa: S608 only question marks
            f"AND state IN ({places}) "
            "AND (variants IS NOT NULL) = COALESCE(?, variants IS NOT NULL) "
            "ORDER BY id DESC LIMIT ?",
            (owner, owner, *chosen, compares, limit),
        )
        return [job_of(row) for row in rows]

    def owned(self, job: int, owner: str | None) -> Job:
        """One record, if it is this owner's. RequestError as if there were none, else."""
        found = self.job(job)
        if found.owner is None or owner not in (None, found.owner):
            raise RequestError(f"job={job}: there is none of that number in the queue")
        return found

    def move(self, job: int, where: str, owner: str | None = None) -> None:
        """Change the order among one owner's waiting jobs: first, up, down or last.

        Raises StateError if the job does not wait any more.
        """
        found = self.owned(job, owner)
        line = [other for other in self.waiting() if other.owner == found.owner]
        at = next((index for index, other in enumerate(line) if other.id == job), None)
        if at is None:
            raise StateError(f"job {job} is {found.state}: only a queued job can be moved")
        to = {"first": 0, "up": max(at - 1, 0), "down": at + 1, "last": len(line)}[where]
        line.insert(to, line.pop(at))
        with self._db:
            self._db.executemany(
                "UPDATE jobs SET place = ? WHERE id = ? AND state = 'queued'",
                [(place, other.id) for place, other in enumerate(line)],
            )

    def remove(self, job: int, owner: str | None = None) -> None:
        """Forget a job that has ended, or still waits. StateError for one that runs."""
        found = self.owned(job, owner)
        cursor = self._db.execute(
            "DELETE FROM jobs WHERE id = ? AND state != ?", (job, State.RUNNING)
        )
        if cursor.rowcount != 1:
            raise StateError(f"job {job} is {found.state}: cancel it first")
        for table in ("events", "previews"):
            self._db.execute(f"DELETE FROM {table} WHERE job = ?", (job,))  # noqa: S608 ours

    def set_preview(self, job: int, step: int, image: bytes) -> None:
        """What the video looks like after a step, as WebP."""
        self._db.execute("REPLACE INTO previews VALUES (?, ?, ?)", (job, step, image))

    def preview(self, job: int, owner: str | None = None) -> tuple[int, bytes] | None:
        """The last preview of an owner's running job: its step and a WebP; None if none is."""
        self.owned(job, owner)
        row = self._db.execute("SELECT step, image FROM previews WHERE job = ?", (job,)).fetchone()
        return (row["step"], row["image"]) if row else None

    def set_draft(self, owner: str, form: Mapping[str, Any]) -> None:
        """What an owner has typed, so that nothing of it is lost."""
        self._db.execute("REPLACE INTO drafts VALUES (?, ?)", (owner, json.dumps(form)))

    def draft(self, owner: str) -> dict[str, Any]:
        """What an owner had typed; empty if nothing."""
        row = self._db.execute("SELECT form FROM drafts WHERE owner = ?", (owner,)).fetchone()
        return dict(json.loads(row["form"])) if row else {}

    def named_files(self) -> set[str]:
        """Every text in the requests of all jobs and in all forms, among them each file that one of
        them needs."""
        rows = self._db.execute("SELECT request FROM jobs UNION ALL SELECT form FROM drafts")
        values = (value for row in rows for value in json.loads(row[0]).values())
        return {value for value in values if isinstance(value, str)}

    def take_seat(self, device: str) -> bool:
        """Be the worker of a device; False if another living process is. A machine that shares
        this file has its own."""
        process = Process.this()
        name = f"{process.host}/{device}"
        self._db.execute("BEGIN IMMEDIATE")
        try:
            row = self._db.execute("SELECT * FROM workers WHERE device = ?", (name,)).fetchone()
            if row and Process(row["host"], row["pid"], row["pid_started"]).alive:
                return bool(row["pid"] == process.pid)
            self._db.execute(
                "REPLACE INTO workers VALUES (?, ?, ?, ?)",
                (name, process.host, process.pid, process.started),
            )
            return True
        finally:
            self._db.execute("COMMIT")

    def leave_seat(self, device: str) -> None:
        """Another process may be the worker now."""
        process = Process.this()
        self._db.execute(
            "DELETE FROM workers WHERE device = ? AND pid = ?",
            (f"{process.host}/{device}", process.pid),
        )
