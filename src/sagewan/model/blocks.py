"""A run's blocks: which forward pass they have, and what of it ran."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sagewan.attention.launch import failed, is_out_of_memory
from sagewan.attention.resolve import ImplementationError, load, name_of
from sagewan.model.attention import Attention
from sagewan.model.transformer import install
from sagewan.plan.blocks import BlockRow

Forward = Callable[..., Tensor]


class Blocks:
    """Gives a run's transformers the forward pass of their plan's row, and keeps the count that the
    report shows: of blocks, and of the kernels that ran between their products."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._kernels: Counter[tuple[str, str]] = Counter()

    def install(self, transformer: Any, attention: Attention, row: BlockRow) -> None:
        """Let the transformer run by this row from now on. Raises ImplementationError."""
        kind = load(row)
        name = name_of(kind, row)
        options = (Passes(row, name, self._kernels),) if row.fused else ()

        def forward(block: Any, attention: Attention, layer: int) -> Forward:
            run = kind(block, attention, layer, *options)

            def counted(*inputs: Any) -> Tensor:
                out: Tensor = run(*inputs)
                self._calls[name] += 1
                return out

            return counted

        install(transformer, attention, forward)

    def ran(self) -> list[dict[str, object]]:
        """What ran blocks and how often, and how often each of its kernels between the products."""
        return [
            {
                "implementation": name,
                "calls": calls,
                "kernels": {k: count for (n, k), count in self._kernels.items() if n == name},
            }
            for name, calls in self._calls.most_common()
        ]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As attention's: what is broken off and done again counts once."""
        before = self._calls.copy(), self._kernels.copy()
        try:
            yield
        except (ImplementationError, RuntimeError, MemoryError):
            self._calls, kernels = before
            self._kernels.clear()
            self._kernels.update(kernels)
            raise


class Passes:
    """Runs the kernels of a row between a block's products, and counts them by their functions."""

    def __init__(self, row: BlockRow, name: str, counts: Counter[tuple[str, str]]) -> None:
        self.row, self._name, self._counts = row, name, counts

    def run(self, kernel: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a kernel gives; what it raises is an ImplementationError, but for out of memory."""
        try:
            out = kernel(*arguments, **options)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise failed(self.row, error) from error
        self._counts[self._name, kernel.__name__] += 1
        return out
