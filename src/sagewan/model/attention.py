"""The self-attention of a run's transformers: whose turn it is, and what the plan chose for it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sagewan.attention.launch import Launcher
from sagewan.kernels.prepared import Prepared
from sagewan.model.residuals import Residuals
from sagewan.model.tiles import Tiles
from sagewan.plan.attention import AttentionPlan, Choice
from sagewan.plan.sparsity import SparsityPlan

# Of the text and, in Wan 2.1, of the picture before it: each [B, M, H, D].
KeysValues = list[tuple[Tensor, Tensor]]


@dataclass
class Turn:
    """Whose turn it is: the plan in force, the step from 0, and ``check``, which is called once
    a block and raises when the user has cancelled. Shared by all layers of a run's experts.

    ``sparsity`` says which calls leave out blocks of keys, and ``tiling`` which blocks those are.
    Where memory is short a block computes ``chunk`` tokens at a time, and attends ``heads`` heads
    at a time; None is all. ``text`` names the text of the pass under way; where there is room,
    ``known`` keeps each layer's keys and values of each text, which no step changes; ``residuals``
    keeps what the blocks add, where a step cache wants it. They belong to one transformer: another
    begins with none. ``whole`` is false where a pass is of some videos of a batch alone.
    """

    plan: AttentionPlan
    steps: int
    check: Callable[[], None]
    step: int = 0
    chunk: int | None = None
    heads: int | None = None
    text: str = ""
    whole: bool = True
    known: dict[tuple[int, str], KeysValues] | None = None
    residuals: Residuals = field(default_factory=Residuals)
    sparsity: SparsityPlan | None = None
    tiling: Tiles | None = None

    def forget_texts(self) -> None:
        """Begin with none, for another transformer."""
        self.residuals.forget()
        if self.known is not None:
            self.known = {}

    @property
    def tiles(self) -> Tiles | None:
        """The order of the tokens at this step, and what they attend to; None where all attend to
        all, in whatever order."""
        return self.tiling if self.sparsity and self.sparsity.sparse_at(self.step) else None

    def block_mask(self, layer: int) -> Tensor | None:
        """What this layer's tokens, in the order of the tiles, attend to; None for all."""
        dense = self.sparsity is None or layer < self.sparsity.dense_layers
        return None if dense or self.tiles is None else self.tiles.mask


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
        mask = self.turn.block_mask(layer)
        return self._launcher.attend(q, k, v, self.choice(layer), block_mask=mask)

    def attend_prepared(self, prepared: Prepared[Any, Any], out: Tensor, layer: int) -> Tensor:
        """As :meth:`attend`, for the prepared form of the layer's implementation; written to out
        [B, H, N, D]."""
        mask = self.turn.block_mask(layer)
        choice = self.choice(layer)
        return self._launcher.attend_prepared(prepared, out, choice, block_mask=mask)

    def choice(self, layer: int) -> Choice:
        """What attends in this layer in the step under way."""
        turn = self.turn
        return turn.plan.choice(turn.step, turn.steps, layer)

    def keys_of_text(self, layer: int, compute: Callable[[], KeysValues]) -> KeysValues:
        """The keys and values of this pass's text in a layer, computed once where they are kept:
        those of a whole batch."""
        known, place = self.turn.known, (layer, self.turn.text)
        if known is None or not self.turn.whole:
            return compute()
        if place not in known:
            known[place] = compute()
        return known[place]

    def whole(self) -> AbstractContextManager[None]:
        """A block whose calls are counted only if no implementation fails in it."""
        return self._launcher.whole()
