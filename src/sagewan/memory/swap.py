"""Blocks that wait in host memory, each brought to the device ahead of its turn.

Two buffers on the device take turns. When a block has run, its buffer is filled with the next but
one, on a second stream: so a copy has the time of all blocks between to pass unseen.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sagewan.memory.mover import Mark, Mover
from sagewan.memory.pinned import PinnedMemory
from sagewan.memory.tensors import packed_bytes, point, tensors_of, views_in

BUFFERS = 2


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Which ``count`` of so many blocks are swapped: evenly, so that the resident ones between
    them give each copy time.

    >>> spread(3, 9)
    (2, 5, 8)
    """
    return tuple(i for i in range(blocks) if (i + 1) * count // blocks > i * count // blocks)


@dataclass
class _Waiting:
    """A swapped block: its tensors, their host data, and the one pinned buffer that holds it,
    if there is one."""

    tensors: list[Tensor]
    host: list[Tensor]
    pinned: Tensor | None = None


@dataclass
class _Slot:
    """A device buffer: the block (by its place in the order) that it holds or is being filled
    with; the marks of its filling and of its last use."""

    buffer: Tensor
    staging: Tensor | None = None
    holds: int | None = None
    filling: "Future[None] | None" = None
    filled: Mark = None
    used: Mark = None


class BlockSwap:
    """Moves the tensors of ``blocks``, in the order in which they run, in and out.

    Built on the host: the blocks are moved into pinned memory as far as its budget goes, the
    others stay where they are (the file's pages, most often) and are staged. Between
    :meth:`start` and :meth:`stop` a hook brings each block to the device when it is called; the
    blocks must be called in order, again and again. A compiled block compiles its ``forward``.
    """

    def __init__(self, blocks: Sequence[Any], mover: Mover, pinned: PinnedMemory) -> None:
        self._mover, self._pinned = mover, pinned
        self._blocks = list(blocks)
        self._waiting: list[_Waiting] = []
        for block in blocks:
            tensors = tensors_of(block)
            self._waiting.append(_Waiting(tensors, [tensor.data for tensor in tensors]))
        self._largest = max((packed_bytes(w.host) for w in self._waiting), default=0)
        self._stages: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._hooks: list[Any] = []
        self._worker: ThreadPoolExecutor | None = None
        self._pin()

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory in use."""
        return self._pinned.used

    @property
    def unpinned_blocks(self) -> int:
        """Blocks that are copied from ordinary memory."""
        return sum(waiting.pinned is None for waiting in self._waiting)

    def start(self) -> None:
        """Take the device's buffers and begin to fill them."""
        count = min(BUFFERS, len(self._waiting))
        stages = [*self._stages, None, None]
        self._slots = [_Slot(self._mover.empty(self._largest), stages[i]) for i in range(count)]
        # The buffers may lie where something was computed a moment ago.
        begun = self._mover.computed()
        for slot in self._slots:
            slot.used = begun
        if self.unpinned_blocks:
            self._worker = ThreadPoolExecutor(1, "sagewan-swap")
        for place, block in enumerate(self._blocks):
            self._hooks += [
                block.register_forward_pre_hook(self._before(place)),
                block.register_forward_hook(self._after(place)),
            ]
        for place in range(count):
            self._fill(place)

    def stop(self) -> None:
        """Give the device's buffers back; the blocks are on the host again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._worker:
            self._worker.shutdown(wait=True)
            self._worker = None
        # The allocator hands a buffer on by the computing's order, which copies are not in.
        self._mover.host_waits(self._mover.copied())
        for waiting in self._waiting:
            point(waiting.tensors, waiting.host)
        self._slots.clear()

    def detach(self) -> None:
        """Leave the blocks in ordinary host memory, as if they had never been swapped."""
        self.stop()
        for waiting in self._waiting:
            if waiting.pinned is not None:
                waiting.host = [data.clone() for data in waiting.host]
                point(waiting.tensors, waiting.host)
        self.close()

    def close(self) -> None:
        """Give the pinned memory back as well; what was pinned in it is lost."""
        self.stop()
        for waiting in self._waiting:
            if waiting.pinned is not None:
                self._pinned.free(waiting.pinned)
        for stage in self._stages:
            self._pinned.free(stage)
        self._stages.clear()
        self._waiting.clear()
        self._blocks.clear()

    def _pin(self) -> None:
        """Move as many blocks as the budget allows into pinned memory; where it does not allow
        all, two buffers of it stage the others."""
        total = sum(packed_bytes(waiting.host) for waiting in self._waiting)
        if total > self._pinned.budget - self._pinned.used:
            stages = (self._pinned.allocate(self._largest) for _ in range(BUFFERS))
            self._stages = [stage for stage in stages if stage is not None]
        for waiting in self._waiting:
            waiting.pinned = self._pinned.allocate(packed_bytes(waiting.host))
            if waiting.pinned is None:
                continue
            views = views_in(waiting.pinned, waiting.host)
            for view, data in zip(views, waiting.host, strict=True):
                view.copy_(data)
            waiting.host = views
            point(waiting.tensors, views)

    def _before(self, place: int) -> Any:
        def bring(*_: object) -> None:
            slot = self._slots[place % len(self._slots)]
            if slot.holds != place:
                self._fill(place)
            if slot.filling:
                slot.filling.result()
                slot.filling = None
            self._mover.compute_waits(slot.filled)
            waiting = self._waiting[place]
            point(waiting.tensors, views_in(slot.buffer, waiting.host))

        return bring

    def _after(self, place: int) -> Any:
        def release(*_: object) -> None:
            waiting = self._waiting[place]
            slot = self._slots[place % len(self._slots)]
            point(waiting.tensors, waiting.host)
            slot.used = self._mover.computed()
            following = self._following(place)
            if following is not None:
                self._fill(following)

        return release

    def _following(self, place: int) -> int | None:
        """The block that shares this one's buffer next; None if there is no other."""
        slots, blocks = len(self._slots), len(self._waiting)
        following = place + slots
        if following >= blocks:
            following = place % slots
        return None if following == place else following

    def _fill(self, place: int) -> None:
        """Begin to fill the block's buffer, which nothing computes with any more after its mark."""
        slot = self._slots[place % len(self._slots)]
        if slot.filling:
            slot.filling.result()
            slot.filling = None
        slot.holds = place
        waiting = self._waiting[place]
        if waiting.pinned is None and self._worker:
            slot.filling = self._worker.submit(self._stage, slot, waiting)
            return
        assert waiting.pinned is not None
        self._mover.copy_waits(slot.used)
        self._mover.copy(slot.buffer[: waiting.pinned.nbytes], waiting.pinned)
        slot.filled = self._mover.copied()

    def _stage(self, slot: _Slot, waiting: _Waiting) -> None:
        """Ordinary memory → the staging buffer → the device, on the worker's thread: the first
        copy is the host's own, and needs not wait for what the device computes."""
        mover = self._mover
        if slot.staging is None:
            mover.copy_waits(slot.used)
            for target, data in zip(views_in(slot.buffer, waiting.host), waiting.host, strict=True):
                mover.copy(target, data)
        else:
            mover.host_waits(slot.filled)  # the copy that read the staging buffer last
            for target, data in zip(
                views_in(slot.staging, waiting.host), waiting.host, strict=True
            ):
                target.copy_(data)
            mover.copy_waits(slot.used)
            size = packed_bytes(waiting.host)
            mover.copy(slot.buffer[:size], slot.staging[:size])
        slot.filled = mover.copied()
