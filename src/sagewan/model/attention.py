"""The self-attention of a run's transformers: whose turn it is, and what the plan chose for it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

from sagewan.attention.launch import Launcher
from sagewan.plan.attention import AttentionPlan


@dataclass
class Turn:
    """Whose turn it is: the plan in force, the step from 0, and ``check``, which is called once
    a block and raises when the user has cancelled. Shared by all layers of a run's experts.

    Where memory is short a block computes ``chunk`` tokens at a time, and attends ``heads`` heads
    at a time; None is all.
    """

    plan: AttentionPlan
    steps: int
    check: Callable[[], None]
    step: int = 0
    chunk: int | None = None
    heads: int | None = None


class Attention:
    """The self-attention of a run's transformers: one launcher, and the turn now under way."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._turn: Turn | None = None

    @contextmanager
    def during(self, turn: Turn) -> Iterator[Turn]:
        """Attend by this plan within the block; the caller counts ``turn.step`` on."""
        self._turn = turn
        try:
            yield turn
        finally:
            self._turn = None

    @property
    def turn(self) -> Turn:
        """The turn now under way."""
        if self._turn is None:
            raise RuntimeError("a transformer was called outside Attention.during")
        return self._turn

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q, k, v [B, H, N, D] → [B, H, N, D], in the implementation planned for this layer."""
        turn = self.turn
        return self._launcher.attend(q, k, v, turn.plan.choice(turn.step, turn.steps, layer))

    def whole(self) -> AbstractContextManager[None]:
        """A block whose calls are counted only if no implementation fails in it."""
        return self._launcher.whole()
