"""The record of jobs: states, several processes, processes that die."""

import itertools
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagewan.errors import RequestError, StateError
from sagewan.jobs import processes, records
from sagewan.jobs.records import JobEvent, default_path
from sagewan.jobs.states import NEXT, State
from sagewan.jobs.store import Store
from sagewan.plan.request import Request

REQUEST = Request(prompt="红色的球", seed=1, size=(64, 64))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def bring(store: Store, job: int, state: State) -> None:
    """A job in the queue → any state, by the shortest way."""
    if state is State.CANCELLED:
        store.cancel(job)
    elif state is not State.QUEUED:
        store.start(job)
        if state is not State.RUNNING:
            store.finish(job, state)


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(NEXT) == set(State)
    reachable = {State.QUEUED}
    for _ in State:
        reachable |= {after for state in reachable for after in NEXT[state]}
    assert reachable == set(State)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(State, State)))
def test_a_job_goes_only_where_the_table_says(path: Path, source: State, target: State) -> None:
    with Store(path) as store:
        job = store.add(REQUEST)
        bring(store, job, source)
        allowed = target in NEXT[source]
        try:
            store._move(job, target)
        except StateError:
            assert not allowed
            assert store.job(job).state is source
        else:
            assert allowed
            assert store.job(job).state is target


@settings(max_examples=15)  # each writes to the disk, in three transactions
@given(prompt=st.text(min_size=1).filter(str.strip), error=st.text())
def test_a_record_survives_another_process(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, error: str
) -> None:
    path = tmp_path_factory.mktemp("jobs") / "jobs.sqlite"
    request = Request(prompt=prompt, seed=5)
    with Store(path) as store:
        job = store.add(request)
        store.start(job)
        store.set_plan(job, {"seed": 5})
        store.add_event(job, JobEvent(at=1.0, stage="denoise", done=1, total=4, memory=7))
        store.finish(job, State.FAILED, error=error)
    with Store(path) as store:
        record = store.job(job)
        assert record.to_request() == request
        assert (record.state, record.error, record.plan) == (State.FAILED, error, {"seed": 5})
        assert record.created <= (record.started or 0) <= (record.finished or 0)
        (event,) = store.events(job)
        assert event == JobEvent(at=1.0, stage="denoise", done=1, total=4, memory=7)


def test_jobs_are_listed_from_the_newest(path: Path) -> None:
    with Store(path) as store:
        ids = [store.add(REQUEST) for _ in range(5)]
        assert [job.id for job in store.jobs()] == ids[::-1]
        assert [job.id for job in store.jobs(2)] == ids[:-3:-1]


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked(path: Path) -> None:
    with Store(path) as store, Store(path) as other:
        queued, running = store.add(REQUEST), store.add(REQUEST)
        store.start(running)
        assert other.cancel(queued) is State.CANCELLED
        assert store.job(queued).state is State.CANCELLED
        assert not store.cancel_asked(running)
        assert other.cancel(running) is State.RUNNING
        assert store.cancel_asked(running)
        store.finish(running, State.CANCELLED)
        with pytest.raises(StateError, match="is cancelled and can't become cancelled"):
            other.cancel(running)


def test_a_job_that_is_not_there(path: Path) -> None:
    with Store(path) as store:
        with pytest.raises(RequestError, match="job=7"):
            store.job(7)
        with pytest.raises(RequestError, match="job=7"):
            store.cancel(7)


def test_a_job_of_a_dead_process_is_failed_by_the_next_store(path: Path) -> None:
    program = (
        "import os, pathlib\n"
        "from sagewan.jobs.store import Store\n"
        "from sagewan.plan.request import Request\n"
        f"store = Store(pathlib.Path({str(path)!r}))\n"
        "store.start(store.add(Request(prompt='x')))\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    with Store(path) as store:
        (job,) = store.jobs()
        assert job.state is State.FAILED
        assert job.error == "its process ended unexpectedly"


def test_a_job_of_a_living_process_runs_on(path: Path) -> None:
    with Store(path) as store:
        job = store.add(REQUEST)
        store.start(job)
        with Store(path):
            pass
        assert store.job(job).state is State.RUNNING


def test_a_number_that_another_process_got_is_not_the_job(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(path) as store:
        job = store.add(REQUEST)
        store.start(job)
        store._db.execute("UPDATE jobs SET pid_started = pid_started - 100")
        with Store(path):
            pass
        assert store.job(job).state is State.FAILED


@pytest.mark.skipif(not processes.psutil.LINUX, reason="others keep the time by the clock")
def test_a_clock_that_is_set_does_not_end_a_job(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psutil = processes.psutil
    create_time, boot_time = psutil.Process.create_time, psutil.boot_time
    with Store(path) as store:
        job = store.add(REQUEST)
        store.start(job)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
        monkeypatch.setattr(psutil, "boot_time", lambda: boot_time() + 3600)
        store.settle_abandoned()
        assert store.job(job).state is State.RUNNING


def test_a_job_of_another_machine_is_left_alone(path: Path) -> None:
    with Store(path) as store:
        job = store.add(REQUEST)
        store.start(job)
        store._db.execute("UPDATE jobs SET host = 'elsewhere', pid_started = 0")
        with Store(path):
            pass
        assert store.job(job).state is State.RUNNING


def test_many_writers_at_once_lose_nothing(path: Path) -> None:
    with Store(path):
        pass

    def work() -> None:
        with Store(path) as store:
            for _ in range(20):
                job = store.add(REQUEST)
                store.start(job)
                store.add_event(job, JobEvent(at=1.0, stage="load", done=0, total=None))
                store.finish(job, State.DONE)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store(path) as store:
        jobs = store.jobs(1000)
        assert len(jobs) == 80
        assert {job.state for job in jobs} == {State.DONE}


def test_only_one_of_two_processes_starts_a_job(path: Path) -> None:
    with Store(path) as first, Store(path) as second:
        job = first.add(REQUEST)
        first.start(job)
        with pytest.raises(StateError):
            second.start(job)


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(sqlite3.Error):
        Store(path)


def test_the_place_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEWAN_DATA", str(tmp_path))
    assert default_path() == tmp_path / "jobs.sqlite"
    monkeypatch.delenv("SAGEWAN_DATA")
    monkeypatch.setattr(records, "user_data_path", lambda *_: tmp_path / "user")
    assert default_path() == tmp_path / "user" / "jobs.sqlite"


def test_a_newer_versions_file_is_left_alone(path: Path) -> None:
    with Store(path) as store:
        store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(sqlite3.DatabaseError, match="newer version"):
        Store(path)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)
    database.close()
