"""A module on its device: all of it, or all but the blocks that are swapped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sagewan.memory.mover import Mover, mover_for
from sagewan.memory.pinned import PinnedMemory
from sagewan.memory.swap import BlockSwap, spread
from sagewan.memory.tensors import point, tensors_of


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a module is to run. ``swapped`` of its blocks wait in host memory, of which
    ``pin_budget`` bytes may be pinned; ``keeps_host`` keeps the host's copy of all the others,
    so that the module can leave the device without a copy, and come back."""

    device: str
    swapped: int = 0
    pin_budget: int = 0
    keeps_host: bool = False


class Placement:
    """A module, loaded on the host, as a :class:`Place` wants it.

    Enters the device when it is made. ``blocks`` are what can be swapped, in the order in which
    they run. After :meth:`leave` the module is on the host (where ``keeps_host``) and
    :meth:`enter` brings it back; after :meth:`close` it is of no use.
    """

    def __init__(
        self, module: Any, blocks: Sequence[Any], place: Place, *, mover: Mover | None = None
    ) -> None:
        self.place = place
        self.module = module
        self._mover = mover or mover_for(place.device)
        self._pinned = PinnedMemory(place.pin_budget, self._mover.register)
        chosen = [blocks[i] for i in spread(min(place.swapped, len(blocks)), len(blocks))]
        swapped = {id(tensor) for block in chosen for tensor in tensors_of(block)}
        self._residents = [t for t in tensors_of(module) if id(t) not in swapped]
        self._host: list[Tensor] | None = None
        self.entered = False
        self._swap: BlockSwap | None = None
        try:
            self._swap = BlockSwap(chosen, self._mover, self._pinned) if chosen else None
            self.enter()
        except BaseException:
            self._pinned.close()
            raise

    @property
    def swap(self) -> BlockSwap | None:
        """The swapped blocks, if there are any."""
        return self._swap

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory pinned for it."""
        return self._pinned.used

    @property
    def refusal(self) -> str | None:
        """Why less is pinned than was wanted, in words, if the system refused."""
        return self._pinned.refusal

    def enter(self) -> None:
        """Bring everything but the swapped blocks to the device."""
        if self.entered:
            return
        self.entered = True
        host = [tensor.data for tensor in self._residents]
        if self.place.keeps_host:
            self._host = host
        point(self._residents, self._mover.place(host))
        # What the copies read must be whole until they are done.
        self._mover.host_waits(self._mover.computed())
        if self._swap:
            self._swap.start()

    def leave(self) -> None:
        """Give the device's memory back; the weights stay on the host where they are kept."""
        if not self.entered:
            return
        self.entered = False
        if self._swap:
            self._swap.stop()
        if self._host is not None:
            point(self._residents, self._host)
            self._host = None

    def detach(self) -> None:
        """Leave the module whole in ordinary host memory, for another placement."""
        self.leave()
        if self._swap:
            self._swap.detach()
            self._swap = None

    def close(self) -> None:
        """Give all memory back: the device's, the pinned, and the module's own."""
        self.leave()
        # Whoever still holds the module, if only the traceback of an error, would hold its memory.
        self.module.to("meta")
        if self._swap:
            self._swap.close()
            self._swap = None
        self._residents.clear()
