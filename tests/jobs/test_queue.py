"""The queue: turns, order, owners, deaths of the worker."""

import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagewan.errors import RequestError, StateError
from sagewan.jobs import outputs
from sagewan.jobs.outputs import file_name, for_queue, forget, outputs_folder, repeat
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import SCHEMA, TABLES
from sagewan.jobs.states import State
from sagewan.jobs.store import Store
from sagewan.plan.request import Request

REQUEST = Request(prompt="a red ball", seed=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def done_in_order(queue: Queue) -> list[int]:
    order = []
    while job := queue.claim():
        order.append(job.id)
        queue.finish(job.id, State.DONE)
    return order


def test_owners_take_turns_and_the_list_is_what_happens(path: Path) -> None:
    with Queue(path) as queue:
        for owner in "aaabbc":
            queue.enqueue(REQUEST, owner)
        expected = [job.id for job in queue.waiting()]
        owners = [job.owner for job in queue.waiting()]
        assert owners == ["a", "b", "c", "a", "b", "a"]
        assert done_in_order(queue) == expected


def test_who_had_a_turn_waits_for_the_others(path: Path) -> None:
    with Queue(path) as queue:
        queue.enqueue(REQUEST, "greedy")
        queue.finish(queue.claim().id, State.DONE)  # type: ignore[union-attr]
        queue.enqueue(REQUEST, "greedy")
        late = queue.enqueue(REQUEST, "new")
        assert queue.waiting()[0].id == late


@pytest.mark.parametrize(
    ("where", "order"), [("first", "312"), ("up", "132"), ("down", "123"), ("last", "123")]
)
def test_the_order_can_be_changed(path: Path, where: str, order: str) -> None:
    with Queue(path) as queue:
        for _ in range(3):
            queue.enqueue(REQUEST, "me")
        queue.enqueue(REQUEST, "other")
        queue.move(3, where, "me")
        mine = [str(job.id) for job in queue.waiting() if job.owner == "me"]
        assert "".join(mine) == order


@settings(max_examples=15)
@given(
    moves=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["first", "up", "down", "last"])))
)
def test_no_order_of_moves_loses_a_job(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]]
) -> None:
    with Queue(tmp_path_factory.mktemp("queue") / "jobs.sqlite") as queue:
        for _ in range(4):
            queue.enqueue(REQUEST, "me")
        for job, where in moves:
            queue.move(job, where)
        assert sorted(done_in_order(queue)) == [1, 2, 3, 4]


def test_the_jobs_of_others_are_not_there(path: Path) -> None:
    with Queue(path) as queue:
        job = queue.enqueue(REQUEST, "a")
        direct = queue.add(REQUEST)
        for number in (job, direct):
            for act in (queue.remove, queue.preview, lambda j, o: queue.move(j, "up", o)):
                with pytest.raises(RequestError, match="none of that number"):
                    act(number, "b")
        assert queue.of("b") == []
        assert [found.id for found in queue.of(None)] == [job]
        assert queue.owned(job, None).owner == "a"


def test_a_run_of_the_command_line_is_never_claimed(path: Path) -> None:
    with Queue(path) as queue:
        queue.add(REQUEST)
        assert queue.claim() is None


def test_many_workers_at_once_run_each_job_once(path: Path) -> None:
    with Queue(path) as queue:
        ids = [queue.enqueue(REQUEST, owner) for owner in "abcd" * 8]
    ran: list[int] = []

    def worker() -> None:
        with Queue(path) as own:
            ran.extend(done_in_order(own))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(ran) == Counter(ids)


def test_a_job_given_back_runs_again_and_keeps_its_place(path: Path) -> None:
    with Queue(path) as queue:
        first, second = queue.enqueue(REQUEST, "me"), queue.enqueue(REQUEST, "me")
        queue.claim()
        queue.give_back(first)
        assert queue.job(first).attempts == 0
        assert done_in_order(queue) == [first, second]


def killed_while_running(path: Path) -> None:
    program = (
        "import os, pathlib\n"
        "from sagewan.jobs.queue import Queue\n"
        f"Queue(pathlib.Path({str(path)!r})).claim()\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60, env=dict(os.environ))


def test_a_worker_that_dies_costs_one_try_and_no_job_twice_more(path: Path) -> None:
    with Queue(path) as queue:
        job = queue.enqueue(REQUEST, "me")
    killed_while_running(path)
    with Queue(path) as queue:
        assert queue.job(job).state is State.QUEUED
    killed_while_running(path)
    with Queue(path) as queue:
        assert queue.job(job).state is State.FAILED
        assert queue.job(job).error == "its process ended unexpectedly, twice"


def test_a_dead_workers_job_that_was_to_be_cancelled_is(path: Path) -> None:
    with Queue(path) as queue:
        job = queue.enqueue(REQUEST, "me")
        queue.claim()
        queue.cancel(job)
        queue._db.execute("UPDATE jobs SET pid_started = pid_started - 100")
        queue.settle_abandoned()
        assert queue.job(job).state is State.CANCELLED


def test_only_one_process_has_the_seat(path: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from sagewan.jobs.queue import Queue\n"
        f"queue = Queue(pathlib.Path({str(path)!r}))\n"
        "print(queue.take_seat('auto'), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with (
        Queue(path) as queue,
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "True"
        assert not queue.take_seat("auto")
        other.communicate()
        assert queue.take_seat("auto")
        assert queue.take_seat("auto")
        queue.leave_seat("auto")


def test_a_file_of_the_first_schema_is_brought_up(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(TABLES)
        database.execute(
            "INSERT INTO jobs (created, state, request) VALUES (1, 'done', '{\"prompt\": \"old\"}')"
        )
        database.execute("PRAGMA user_version = 1")
    database.close()
    with Store(path) as store:
        assert store.job(1).to_request().prompt == "old"
        assert store.job(1).owner is None
        assert store._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA


def test_two_processes_may_bring_a_file_up_at_once(path: Path) -> None:
    failures: list[BaseException] = []

    def opens() -> None:
        try:
            with Store(path):
                pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=opens) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_previews_live_as_long_as_the_run(path: Path) -> None:
    with Queue(path) as queue:
        job = queue.enqueue(REQUEST, "me")
        queue.claim()
        assert queue.preview(job, "me") is None
        queue.set_preview(job, 1, b"one")
        queue.set_preview(job, 2, b"two")
        assert queue.preview(job, "me") == (2, b"two")
        with pytest.raises(StateError, match="cancel it first"):
            queue.remove(job, "me")
        queue.finish(job, State.DONE)
        assert queue.preview(job, "me") is None


@given(text=st.text())
def test_a_file_name_is_safe(text: str) -> None:
    name = file_name(text)
    assert name
    assert len(name) <= 60
    assert not set(name) & set('/\\:.<>|"*? \0')
    assert not name.startswith("-")


def test_each_job_has_its_folder_and_takes_it_along(path: Path, tmp_path: Path) -> None:
    with Queue(path) as queue:
        requests = [for_queue(REQUEST) for _ in range(3)]
        folders = {request.output.parent for request in requests}
        assert len(folders) == 3
        assert {folder.parent for folder in folders} == {outputs_folder()}
        job = queue.enqueue(requests[0], "me")
        requests[0].output.write_bytes(b"video")
        again = repeat(queue, queue.job(job), 5, "me")
        assert queue.job(again).to_request().seed == 5
        assert queue.job(again).request["output"] != queue.job(job).request["output"]
        forget(queue, job, "me")
        assert not requests[0].output.parent.exists()


def test_files_elsewhere_are_not_deleted(path: Path, tmp_path: Path) -> None:
    video = tmp_path / "mine.mp4"
    video.write_bytes(b"video")
    with Queue(path) as queue:
        forget(queue, queue.enqueue(Request(prompt="x", output=video), "me"), "me")
    assert video.exists()


def test_an_outputs_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(outputs, "outputs_folder", lambda: tmp_path / "file")
    with pytest.raises(RequestError, match="can't be made"):
        for_queue(REQUEST)


def test_every_order_of_owners_is_fair(path: Path) -> None:
    with Queue(path) as queue:
        for owner in itertools.chain("a" * 10, "b" * 2):
            queue.enqueue(REQUEST, owner)
        turns = [job.owner for job in queue.waiting()]
        assert turns[:4] == ["a", "b", "a", "b"]
