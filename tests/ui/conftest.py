"""The app without a browser: pages are asked for over HTTP, in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from sagewan.jobs.queue import Queue
from sagewan.jobs.records import default_path
from sagewan.plan.request import Request
from sagewan.ui.quick_gradio import import_gradio

import_gradio()


@pytest.fixture
def queue(own_folders: None) -> Iterator[Queue]:
    with Queue(default_path()) as opened:
        yield opened


@pytest.fixture
def client(own_folders: None) -> Iterator[TestClient]:
    """A visitor of a server that has no pages of gradio's, only what is ours."""
    from sagewan.ui.front import OURS, Front, Site
    from sagewan.ui.server import make_app

    front = Front(Site(), {OURS: make_app})
    with TestClient(front.app, base_url="http://localhost", follow_redirects=False) as opened:
        yield opened


def finished(queue: Queue, request: Request, owner: str, video: bytes = b"video") -> int:
    """A job of an owner that is done, with its video where the queue keeps it."""
    from sagewan.jobs.outputs import for_queue
    from sagewan.jobs.states import State

    made = for_queue(request)
    job = queue.enqueue(made, owner)
    queue.start(job)
    Path(made.output).write_bytes(video)
    queue.finish(job, State.DONE, report={"output": {"path": str(made.output)}})
    return job
