"""A run with its record kept."""

from pathlib import Path

import pytest

from sagewan.errors import Cancelled, RejectedError
from sagewan.jobs import run
from sagewan.jobs.run import run_job
from sagewan.jobs.states import State
from sagewan.jobs.store import Store
from sagewan.pipeline.decide import Decision
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.run import Prepared, Result
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from tests.machines import DEMO, machine

REQUEST = Request(prompt="a red ball", seed=3)


def prepared(request: Request) -> Prepared:
    plan = make_plan(request, DEMO, machine(), Evidence())
    decision = Decision(
        request=request, model=DEMO, hardware=machine(), evidence=Evidence(), plan=plan
    )
    return Prepared(decision=decision, pictures={})


class Fake:
    """Stands in for ``execute``: goes through some stages, then ends as it was told."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.wait_for_cancel = False

    def __call__(self, ready: Prepared, watch: Watch, *, loaded: object = None) -> Result:
        watch.planned(ready.plan)
        watch.stage("load")
        watch.stage("denoise", 2)
        watch.step(1)
        while self.wait_for_cancel:
            watch.check()
        if self.error:
            raise self.error
        return Result(path=Path("a.mp4"), plan=ready.plan, report={"output": {"frames": 17}})


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(run, "execute", fake)
    return fake


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def test_a_success_is_recorded_with_plan_stages_and_report(execute: Fake, path: Path) -> None:
    with Store(path) as store:
        run_job(store, prepared(REQUEST), Watch())
        (job,) = store.jobs()
        assert job.state is State.DONE
        assert job.to_request() == REQUEST
        assert job.report == {"output": {"frames": 17}}
        assert job.plan is not None
        assert job.plan["seed"] == 3
        assert [event.stage for event in store.events(job.id)][:2] == ["load", "denoise"]


@pytest.mark.parametrize(
    ("error", "state", "sentence"),
    [
        (RejectedError("the video is black"), State.FAILED, "the video is black"),
        (ZeroDivisionError("a bug"), State.FAILED, "ZeroDivisionError: a bug"),
        (Cancelled("cancelled"), State.CANCELLED, None),
        (KeyboardInterrupt(), State.CANCELLED, None),
    ],
)
def test_a_failure_is_recorded_and_raised(
    execute: Fake, path: Path, error: BaseException, state: State, sentence: str | None
) -> None:
    execute.error = error
    with Store(path) as store:
        with pytest.raises(type(error)):
            run_job(store, prepared(REQUEST), Watch())
        (job,) = store.jobs()
        assert (job.state, job.error) == (state, sentence)


def test_another_process_can_cancel(execute: Fake, path: Path) -> None:
    execute.wait_for_cancel = True
    with Store(path) as store, Store(path) as other:
        watch = Watch()
        watch.listen(lambda event: event.done == 1 and other.cancel(other.jobs()[0].id))
        with pytest.raises(Cancelled):
            run_job(store, prepared(REQUEST), watch)
        assert store.jobs()[0].state is State.CANCELLED


def test_a_job_that_was_cancelled_in_the_queue_does_not_run(
    execute: Fake, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Store.start

    def late(self: Store, job: int) -> None:
        self.cancel(job)
        start(self, job)

    monkeypatch.setattr(Store, "start", late)
    execute.error = AssertionError("it ran")
    with Store(path) as store:
        with pytest.raises(Cancelled):
            run_job(store, prepared(REQUEST), Watch())
        assert store.jobs()[0].state is State.CANCELLED


def test_a_database_that_breaks_does_not_stop_the_run(
    execute: Fake, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(path) as store:
        watch = Watch()
        watch.listen(lambda event: event.stage == "load" and store._db.execute("DROP TABLE events"))
        result = run_job(store, prepared(REQUEST), watch)
    assert result.path == Path("a.mp4")
    assert sum("can't be kept" in line for line in caplog.messages) == 1


def test_a_record_that_another_process_closed_does_not_stop_the_run(
    execute: Fake, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(path) as store, Store(path) as other:
        watch = Watch()
        watch.listen(
            lambda event: (
                event.stage == "load" and other.finish(other.jobs()[0].id, State.FAILED, error="?")
            )
        )
        assert run_job(store, prepared(REQUEST), watch).path == Path("a.mp4")
    assert "the record of this job can't be kept" in caplog.text
