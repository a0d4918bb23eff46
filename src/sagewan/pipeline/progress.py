"""Progress of a run, and its cancellation: reported to whoever watches, asked for by anyone."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sagewan.errors import Cancelled
from sagewan.plan.plan import Plan

# A question such as a read of the jobs database is asked at most this often, in seconds.
POLL_INTERVAL = 0.25

# The stage before anything is loaded.
DECIDE = "decide"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Where a run stands: ``done`` of ``total`` steps of a stage (``total`` None: not counted).

    ``seconds`` is the time since the stage began; ``seconds_left`` the estimate of what remains
    of it, None while nothing is known. ``plan`` comes with the event of a new plan; ``part`` says
    which video it is where several are made.
    """

    stage: str
    part: str | None = None
    done: int = 0
    total: int | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds per stage, and per step of the stages that count steps."""

    stages: Mapping[str, float]
    steps: Mapping[str, Sequence[float]]

    @property
    def total(self) -> float:
        return sum(self.stages.values())


class Watch:
    """Passed down through a run. Without a listener it shows nothing; it is never in the way.

    Listeners receive an :class:`Event` at each stage and step, on the thread that runs.
    """

    def __init__(
        self, on_event: Callable[[Event], None] | None = None, *, part: str | None = None
    ) -> None:
        self._part = part
        self._listeners = [on_event] if on_event else []
        self._viewers: list[Callable[[int, bytes], None]] = []
        self._drawer: Callable[[Any], bytes] | None = None
        self._questions: list[Callable[[], bool]] = []
        self._asked = -float("inf")
        self._cancelled = threading.Event()
        self._stage: str | None = None
        self._total: int | None = None
        self._done = 0
        self._began = 0.0
        self._last_step = 0.0
        self._stages: dict[str, float] = {}
        self._steps: dict[str, list[float]] = {}

    def listen(self, on_event: Callable[[Event], None]) -> None:
        """One more listener."""
        self._listeners.append(on_event)

    def show_to(self, viewer: Callable[[int, bytes], None]) -> None:
        """One more viewer of previews: the step, and what the video looks like then, as WebP."""
        self._viewers.append(viewer)

    @property
    def is_viewed(self) -> bool:
        """Whether anyone wants previews, which cost a little."""
        return bool(self._viewers)

    def draw_with(self, drawer: Callable[[Any], bytes]) -> None:
        """How latents become a preview."""
        self._drawer = drawer

    def show(self, step: int, latents: Callable[[], Any]) -> None:
        """The latents expected after this step; computed only if somebody looks."""
        if self._viewers and self._drawer:
            image = self._drawer(latents())
            for viewer in self._viewers:
                viewer(step, image)

    def for_part(self, part: str) -> "Watch":
        """A watch for one of several videos, with clocks of its own and these listeners."""
        child = Watch(part=part)
        child._listeners, child._viewers = self._listeners, self._viewers
        child.stop_when(self._is_stopped)
        return child

    def silent(self) -> "Watch":
        """A watch that tells nobody of its stages, and is cancelled with this one."""
        child = Watch()
        child.stop_when(self._is_stopped)
        return child

    def _is_stopped(self) -> bool:
        try:
            self.check()
        except Cancelled:
            return True
        return False

    def stop_when(self, question: Callable[[], bool]) -> None:
        """Ask now and then whether to stop, for a wish that lies in another process."""
        self._questions.append(question)

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins and the one before it ends; ``total`` is its number of steps."""
        self._close_stage()
        self._stage, self._total, self._done = name, total, 0
        self._began = self._last_step = time.perf_counter()
        self._emit()
        self.check()

    def step(self, done: int) -> None:
        """``done`` steps of this stage are finished."""
        now = time.perf_counter()
        if self._stage is not None:
            self._steps.setdefault(self._stage, []).append(now - self._last_step)
        self._last_step, self._done = now, done
        self._emit()
        self.check()

    @contextmanager
    def within(self, name: str, total: int | None = None) -> Iterator[None]:
        """A stage within the one under way, which goes on after it as if no time had passed."""
        outer = self._stage, self._total, self._done, self._began, self._last_step
        # The outer one is only interrupted: its time so far is added when it ends.
        self._stage = None
        entered = time.perf_counter()
        self.stage(name, total)
        try:
            yield
        finally:
            self._close_stage()
            spent = time.perf_counter() - entered
            self._stage, self._total, self._done, self._began, self._last_step = outer
            self._began += spent
            self._last_step += spent
            if self._stage is not None:
                self._emit()

    def planned(self, plan: Plan) -> None:
        """A plan was made, or made again."""
        self._emit(plan)

    def cancel(self) -> None:
        """Ask the run to stop at its next check; may be called from any thread."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise Cancelled if the run was asked to stop. Cheap: called once per block."""
        now = time.monotonic()
        if self._questions and now - self._asked >= POLL_INTERVAL:
            self._asked = now
            if any(question() for question in self._questions):
                self.cancel()
        if self._cancelled.is_set():
            raise Cancelled("cancelled")

    def timings(self) -> Timings:
        """The seconds so far; a stage that came twice has the sum. Ends the stage under way."""
        self._close_stage()
        return Timings(dict(self._stages), {name: tuple(s) for name, s in self._steps.items()})

    def _close_stage(self) -> None:
        if self._stage is not None:
            spent = time.perf_counter() - self._began
            self._stages[self._stage] = self._stages.get(self._stage, 0.0) + spent
            self._stage = None

    def _emit(self, plan: Plan | None = None) -> None:
        seconds = time.perf_counter() - self._began
        left = None
        if self._total is not None and self._done:
            left = seconds / self._done * (self._total - self._done)
        event = Event(
            stage=self._stage or "",
            part=self._part,
            done=self._done,
            total=self._total,
            seconds=seconds,
            seconds_left=left,
            plan=plan,
        )
        for listener in self._listeners:
            listener(event)
