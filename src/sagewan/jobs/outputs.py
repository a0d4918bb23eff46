"""Where the videos of the queue go: a folder of its own for each job, never a path from outside."""

import os
import re
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path

from sagewan.errors import RequestError
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import Job, default_path
from sagewan.plan.request import Request
from sagewan.plan.serialize import request_from_json, settings

_LONGEST = 60


def outputs_folder() -> Path:
    """Where the videos of the queue are kept: ``SAGEWAN_OUTPUTS``, or beside the jobs."""
    chosen = os.environ.get("SAGEWAN_OUTPUTS")
    return Path(chosen).expanduser().absolute() if chosen else default_path().parent / "outputs"


def file_name(text: str) -> str:
    """A safe name for a file, without its ending: letters and digits of any script, the rest
    becomes ``-``. ``a red ball!`` → ``a-red-ball``."""
    return re.sub(r"[\W_]+", "-", text).strip("-")[:_LONGEST].strip("-") or "sagewan"


def for_queue(request: Request, name: str | None = None) -> Request:
    """The request as a worker in another folder must have it: paths absolute, the video in a new
    folder of its own, called ``name`` or after the prompt, and the report beside it if wanted.

    Raises RequestError if the folder can't be made.
    """
    moment = time.strftime("%Y%m%d-%H%M%S")
    folder = outputs_folder() / f"{moment}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RequestError(
            f"the folder {folder} can't be made ({error.strerror}); set SAGEWAN_OUTPUTS to another"
        ) from error
    output = folder / f"{file_name(name or request.prompt)}.mp4"
    report = output.with_suffix(".report.json") if request.report else None
    return replace(request_from_json(settings(request)), output=output, report=report)


def repeat(queue: Queue, job: Job, seed: int, owner: str) -> int:
    """A new job like ``job`` with another seed; its number."""
    request = replace(job.to_request(), seed=seed)
    return queue.enqueue(for_queue(request), owner, job.variants)


def forget(queue: Queue, job: int, owner: str | None = None) -> None:
    """Remove a job that does not run, and its files if they lie in the outputs folder."""
    found = queue.owned(job, owner)
    queue.remove(job, owner)
    folder = Path(found.request["output"]).parent
    if folder.parent == outputs_folder():
        shutil.rmtree(folder, ignore_errors=True)
