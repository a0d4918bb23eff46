"""``sagewan jobs``: the record of the runs."""

import argparse
import json
import sqlite3
import time
from dataclasses import asdict
from typing import Any

from sagewan.cli.show import duration
from sagewan.errors import RequestError, StateError
from sagewan.jobs.records import Job, default_path
from sagewan.jobs.states import State
from sagewan.jobs.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list (the default), show ID, cancel ID."""
    parser.add_argument("action", nargs="?", choices=("list", "show", "cancel"), default="list")
    parser.add_argument("id", nargs="?", type=int, help="the job's number, for show and cancel")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="list the latest N")


def run(arguments: argparse.Namespace) -> int:
    """Print the records, or ask a job to stop."""
    if arguments.limit < 1:
        raise RequestError(f"limit={arguments.limit}: list at least 1")
    if (arguments.action == "list") is not (arguments.id is None):
        wanted = "no number" if arguments.action == "list" else "the job's number"
        raise RequestError(f"jobs {arguments.action} takes {wanted}; see sagewan jobs list")
    try:
        with Store(default_path()) as store:
            text = _ACTIONS[arguments.action](store, arguments)
    except (OSError, sqlite3.Error) as error:
        raise RequestError(
            f"the jobs in {default_path()} can't be read ({error}); set SAGEWAN_DATA to a folder "
            "that can be written"
        ) from error
    print(text)
    return 0


def _list(store: Store, arguments: argparse.Namespace) -> str:
    jobs = store.jobs(arguments.limit)
    if arguments.json:
        return json.dumps([asdict(job) for job in jobs], indent=2)
    lines = (
        f"{job.id:5}  {when(job.created)}  {job.state:<9}  {job.request['prompt']}" for job in jobs
    )
    return "\n".join(lines) or "no jobs yet"


def _show(store: Store, arguments: argparse.Namespace) -> str:
    job = store.job(arguments.id)
    events = store.events(job.id)
    if arguments.json:
        return json.dumps({**asdict(job), "events": [asdict(event) for event in events]}, indent=2)
    lines = [f"{name:<9} {value}" for name, value in _lines(job)]
    for event in events:
        total = "" if event.total is None else f" {event.done}/{event.total}"
        lines.append(f"{when(event.at)}  {event.stage}{total}")
    return "\n".join(lines)


def _cancel(store: Store, arguments: argparse.Namespace) -> str:
    try:
        state = store.cancel(arguments.id)
    except StateError:
        ended = store.job(arguments.id).state
        raise RequestError(f"job={arguments.id} is {ended}: there is nothing to cancel") from None
    return f"job {arguments.id}: {'asked to stop' if state is State.RUNNING else 'cancelled'}"


_ACTIONS = {"list": _list, "show": _show, "cancel": _cancel}


def _lines(job: Job) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = [("job", job.id), ("state", job.state)]
    lines += [(name, value) for name, value in job.request.items() if value not in (None, [])]
    if job.started and job.finished:
        lines.append(("took", duration(job.finished - job.started)))
    if job.error:
        lines.append(("error", job.error))
    return lines


def when(seconds: float) -> str:
    """Seconds since 1970 as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
