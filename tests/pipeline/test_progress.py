"""Progress and cancellation."""

import contextlib
import threading
import time

import pytest

from sagewan.errors import Cancelled
from sagewan.pipeline.progress import POLL_INTERVAL, Event, Watch


def test_a_watch_alone_is_silent_and_counts_time() -> None:
    watch = Watch()
    watch.stage("load")
    time.sleep(0.02)
    watch.stage("denoise", 2)
    watch.step(1)
    watch.step(2)
    timings = watch.timings()
    assert list(timings.stages) == ["load", "denoise"]
    assert timings.stages["load"] >= 0.02
    assert len(timings.steps["denoise"]) == 2
    assert timings.total == pytest.approx(sum(timings.stages.values()))


def test_events_tell_the_time_left_once_a_step_is_done() -> None:
    events: list[Event] = []
    watch = Watch(events.append)
    watch.stage("denoise", 4)
    time.sleep(0.02)
    watch.step(1)
    start, first = events
    assert (start.stage, start.done, start.total, start.seconds_left) == ("denoise", 0, 4, None)
    assert first.seconds_left == pytest.approx(3 * first.seconds)


def test_a_stage_that_comes_twice_has_the_sum() -> None:
    watch = Watch()
    for _ in range(2):
        watch.stage("denoise")
        time.sleep(0.01)
    assert watch.timings().stages["denoise"] >= 0.02


def test_cancel_from_another_thread_ends_at_the_next_check() -> None:
    watch = Watch()
    watch.check()
    thread = threading.Thread(target=watch.cancel)
    thread.start()
    thread.join()
    for check in (watch.check, lambda: watch.step(1), lambda: watch.stage("x")):
        with pytest.raises(Cancelled):
            check()


def test_a_question_is_asked_at_most_once_an_interval_and_its_yes_stays() -> None:
    asked = []

    def question() -> bool:
        asked.append(time.monotonic())
        return len(asked) == 2

    watch = Watch()
    watch.stop_when(question)
    began = time.monotonic()
    while time.monotonic() - began < 10 and len(asked) < 2:
        with contextlib.suppress(Cancelled):
            watch.check()
    assert len(asked) == 2
    assert asked[1] - asked[0] >= POLL_INTERVAL
    with pytest.raises(Cancelled):
        watch.check()
