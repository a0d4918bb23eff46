"""What a run looks like on a terminal, and in a log file; all of it on stderr."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sagewan.cli.streams import say
from sagewan.pipeline.progress import DECIDE, Event, Watch
from sagewan.plan.counted import counted
from sagewan.plan.plan import Plan

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Lines a counted stage may take where there is no terminal to redraw a bar on.
_LINES = 10


@contextlib.contextmanager
def shown(watch: Watch) -> Iterator[None]:
    """Show the watch's progress while the block runs."""
    with _bar(watch) if _can_redraw() else _lines(watch):
        yield


def _can_redraw() -> bool:
    """Whether stderr is a terminal on which a bar can be drawn over; an editor's shell is none."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Notes:
    """Tells what the plan wants told, each sentence once, however often it is made again."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, plan: Plan) -> None:
        drawn = f"{plan.model.name}, {plan.size[0]}x{plan.size[1]}, "
        drawn += f"{counted(plan.frames, 'frame')}, {counted(plan.steps.count, 'step')}, "
        drawn += f"seed {plan.seed}, on {plan.device.name}"
        for note in (drawn, *plan.notes):
            if note not in self._told:
                self._told.add(note)
                say(note)


@contextlib.contextmanager
def _lines(watch: Watch) -> Iterator[None]:
    notes = Notes()

    def show(event: Event) -> None:
        if event.plan:
            notes.tell(event.plan)
        elif event.stage == DECIDE:
            pass  # A moment; a refusal is to stand alone.
        elif event.total is None or event.done == 0:
            say(_title(event))
        elif event.done * _LINES // event.total != (event.done - 1) * _LINES // event.total:
            say(f"{_title(event)} {progress_text(event)}")

    watch.listen(show)
    yield


@contextlib.contextmanager
def _bar(watch: Watch) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        watch.listen(_BarListener(progress))
        yield


class _BarListener:
    """One bar, for the stage under way."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._notes = Notes()
        self._title: str | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        if event.plan:
            self._notes.tell(event.plan)
            return
        title = _title(event)
        if title != self._title or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._title = title
            self._task = self._progress.add_task(title, total=event.total, text="")
        text = progress_text(event) if event.total and event.done else ""
        self._progress.update(self._task, completed=event.done, total=event.total, text=text)


def _title(event: Event) -> str:
    return f"{event.part}: {event.stage}" if event.part else event.stage


def progress_text(event: Event) -> str:
    """``4/16, 0.31 s/step, 4.0 s left``."""
    text = f"{event.done}/{event.total}"
    if event.done:
        text += f", {event.seconds / event.done:.2f} s/step"
    if event.seconds_left is not None:
        text += f", {duration(event.seconds_left)} left"
    return text


def duration(seconds: float) -> str:
    """``9.8 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
