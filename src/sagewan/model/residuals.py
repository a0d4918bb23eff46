"""What a transformer's blocks add to the tokens: kept from one step for the next, or measured."""

from collections.abc import Callable

import torch
from torch import Tensor

Blocks = Callable[[Tensor], Tensor]


class Residuals:
    """What the blocks last added, for each text; ``reuse`` takes it in their place, ``keep`` keeps
    it after them. Whoever runs the steps sets both before each pass."""

    def __init__(self) -> None:
        self.reuse = False
        self.keep = False
        self._kept: dict[str, Tensor] = {}

    def knows(self, text: str) -> bool:
        """Whether something is kept of this text's last pass."""
        return text in self._kept

    def forget(self) -> None:
        """Begin with none, for another transformer."""
        self._kept.clear()

    def through(self, text: str, hidden: Tensor, blocks: Blocks) -> Tensor:
        """The hidden state [B, N, W], which is overwritten, as it is after the blocks."""
        if self.reuse:
            return hidden.add_(self._kept[text])
        # Before anything new is made: it takes as much as the hidden state.
        self._kept.pop(text, None)
        if not self.keep:
            return blocks(hidden)
        before = hidden.clone()
        after = blocks(hidden)
        self._kept[text] = torch.sub(after, before, out=before)
        return after


class Measuring(Residuals):
    """Measures how large what is added for one ``text`` is at each step: ``magnitudes`` holds, for
    each of its passes, the mean over the tokens of the factor from the pass before."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self.magnitudes: list[float | None] = []

    def through(self, text: str, hidden: Tensor, blocks: Blocks) -> Tensor:
        """As it is after the blocks, which are always run."""
        if text != self._text:
            return blocks(hidden)
        before = hidden.clone()
        after = blocks(hidden)
        residual = torch.sub(after, before, out=before)
        last = self._kept.get(text)
        factor = None
        if last is not None:
            sizes = residual.float().norm(dim=-1), last.float().norm(dim=-1)
            factor = float((sizes[0] / sizes[1].clamp(min=1e-12)).mean())
        self.magnitudes.append(factor)
        self._kept[text] = residual
        return after
