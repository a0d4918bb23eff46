"""The worker: jobs to their end, one error no end of the others, stops that lose nothing."""

import threading
from pathlib import Path
from typing import Any

import pytest

from sagewan.errors import RejectedError, RequestError, StateError
from sagewan.jobs import run
from sagewan.jobs.queue import Queue
from sagewan.jobs.states import State
from sagewan.jobs.worker import work
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.run import Result
from sagewan.pipeline.session import Session
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from tests.machines import DEMO, machine

Run = Any


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


class Fake:
    """Stands in for ``generate``; a prompt says how it ends."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.started = threading.Event()

    def __call__(self, request: Request, *, watch: Watch) -> Result:
        self.ran.append(request.prompt)
        plan = make_plan(request, DEMO, machine(), Evidence())
        watch.planned(plan)
        watch.stage("denoise", 2)
        watch.draw_with(lambda latents: latents)
        watch.show(1, lambda: b"preview")
        self.started.set()
        while "ball" in request.prompt:
            watch.check()
        if "star" in request.prompt:
            raise RejectedError("the video is black")
        if "right" in request.prompt:
            raise ZeroDivisionError("a bug")
        return Result(path=request.output, plan=plan, report={"fine": True})


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(
        Session, "generate", lambda self, request, watch: fake(request, watch=watch)
    )
    return fake


def put(path: Path, *prompts: str) -> None:
    with Queue(path) as queue:
        for prompt in prompts:
            queue.enqueue(Request(prompt=prompt, seed=1), "me")


def states(path: Path) -> list[State]:
    with Queue(path) as queue:
        return [job.state for job in reversed(queue.jobs())]


def test_each_job_ends_in_its_own_way_and_the_next_runs(generate: Fake, path: Path) -> None:
    put(path, "a star", "to the right", "red")
    work(path, threading.Event(), until_empty=True)
    assert states(path) == [State.FAILED, State.FAILED, State.DONE]
    with Queue(path) as queue:
        assert queue.job(1).error == "the video is black"
        assert queue.job(2).error == "ZeroDivisionError: a bug"
        assert "Traceback" in queue.job(2).log
        assert queue.job(3).report == {"fine": True}
        assert queue.job(3).plan is not None


def in_thread(path: Path, stop: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=work, args=(path, stop))
    thread.start()
    return thread


def test_a_stopped_worker_gives_its_job_back(generate: Fake, path: Path) -> None:
    put(path, "a ball", "red")
    stop = threading.Event()
    thread = in_thread(path, stop)
    assert generate.started.wait(20)
    stop.set()
    thread.join(20)
    assert states(path) == [State.QUEUED, State.QUEUED]
    with Queue(path) as queue:
        assert queue.waiting()[0].id == 1


def test_a_cancelled_job_ends_and_the_next_runs(generate: Fake, path: Path) -> None:
    put(path, "a ball", "red")
    stop = threading.Event()
    thread = in_thread(path, stop)
    assert generate.started.wait(20)
    with Queue(path) as queue:
        assert queue.preview(1) == (1, b"preview")
        queue.cancel(1)
        for _ in range(200):
            if queue.job(2).state is State.DONE:
                break
            threading.Event().wait(0.05)
    stop.set()
    thread.join(20)
    assert states(path) == [State.CANCELLED, State.DONE]


def test_a_second_worker_is_refused(
    generate: Fake, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Queue, "take_seat", lambda self, device: False)
    with pytest.raises(StateError, match="another process"):
        work(path, threading.Event(), until_empty=True)


def test_a_comparison_is_one_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Compared:
        def to_json(self) -> dict[str, object]:
            return {"videos": []}

    def compare(variants: list[Any], *, watch: Watch, loaded: Session) -> Compared:
        seen.extend(variant.request.attention for variant in variants)
        return Compared()

    monkeypatch.setattr(run, "compare", compare)
    with Queue(path) as queue:
        changes = [{"attention": "sdpa"}, {"attention": "sageattn"}]
        queue.enqueue(Request(prompt="red", seed=1), "me", changes)
        queue.enqueue(Request(prompt="red", seed=1), "me", changes[:1])
    work(path, threading.Event(), until_empty=True)
    assert seen == ["sdpa", "sageattn"]
    with Queue(path) as queue:
        assert queue.job(1).report == {"videos": []}
        assert "2 to 4 settings" in (queue.job(2).error or "")


def test_a_request_of_another_version_fails_in_words(generate: Fake, path: Path) -> None:
    put(path, "red")
    with Queue(path) as queue:
        queue._db.execute("""UPDATE jobs SET request = '{"prompt": "x", "new": 1}'""")
    work(path, threading.Event(), until_empty=True)
    with Queue(path) as queue:
        assert "the setting new is not known" in (queue.job(1).error or "")
    with pytest.raises(RequestError):
        Request(prompt="")
