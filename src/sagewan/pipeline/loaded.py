"""The models of one process: each loaded when it is its turn, and kept between runs if wanted."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sagewan.memory.heap import give_back_heap
from sagewan.memory.placement import Place, Placement
from sagewan.plan.budget.stage import CONTEXT
from sagewan.plan.hardware import Hardware
from sagewan.plan.lora import LoraFile

if TYPE_CHECKING:
    from sagewan.model.lora import Adapters
    from sagewan.pipeline.conditions import Conditions

logger = logging.getLogger(__name__)


def _nothing() -> int:
    return 0


def _no_blocks(_: Any) -> Sequence[Any]:
    return ()


@dataclass
class Part:
    """One model of a run, loaded when it is its turn.

    ``load`` gives the module on the host, ``blocks`` what of it can be swapped. A part that is not
    kept is freed after its turn; one that is kept leaves the device, or stays there, as the
    caller says. Weights that keep their dtype stay in the file's pages, so loading again costs
    little. ``loras`` are those that it is to have on; others are taken off without loading it
    again. ``weight_bytes`` is what its weights take in memory, and ``formats`` counts its matrices
    by their format; both are empty until it is first loaded. ``pinned_bytes``, ``unpinned_blocks``
    and ``refusal`` tell of the last placement; ``pinned_beside`` is what other parts have pinned of
    the same budget.
    """

    name: str
    load: Callable[[], Any]
    blocks: Callable[[Any], Sequence[Any]] = _no_blocks
    kept: bool = False
    loras: tuple[LoraFile, ...] = ()
    weight_bytes: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    pinned_bytes: int = 0
    unpinned_blocks: int = 0
    refusal: str | None = None
    pinned_beside: Callable[[], int] = _nothing
    _module: Any = field(default=None, init=False, repr=False)
    _adapters: "Adapters | None" = field(default=None, init=False, repr=False)
    _worn: tuple[LoraFile, ...] = field(default=(), init=False, repr=False)
    _placement: Placement | None = field(default=None, init=False, repr=False)

    @contextmanager
    def on(self, where: Place | str, *, stays: bool = False) -> Iterator[Any]:
        """The module in evaluation mode on a device, all of it if only the device is named.

        At the end of the block it is freed or, if it is kept, leaves the device but for ``stays``.
        Raises CheckpointError if a weight is missing or has another shape than the config says.
        """
        place = Place(device=where) if isinstance(where, str) else where
        try:
            # Weights outlive the run, and are pointed elsewhere; tensors made in inference mode
            # can't be.
            with torch.inference_mode(mode=False):
                module = self._enter(place)
            yield module
            if not (self.kept and stays):
                self.leave()
        except BaseException:
            # Most often memory ran out: whoever goes on needs all there is.
            self.leave()
            raise

    @property
    def placement(self) -> Placement | None:
        """Where its weights are, while it is loaded."""
        return self._placement

    def leave(self) -> None:
        """Leave the device; freed, if it is not kept."""
        if not self.kept:
            self.close()
        elif self._placement:
            self._placement.leave()
            _give_back(self._placement.place.device)

    def close(self) -> None:
        """Free it. It can be loaded again."""
        placement, module = self._placement, self._module
        self._placement = self._module = self._adapters = None
        self._worn = ()
        if placement:
            placement.close()
            _give_back(placement.place.device)
        elif module is not None:
            module.to("meta")
        if module is not None:
            give_back_heap()

    def _enter(self, place: Place) -> Any:
        place = replace(place, keeps_host=self.kept)
        moves = not self.kept and place.device != "cpu"
        # Free host memory is never twice the same; what is pinned already is worth more.
        if self._placement and self._placement.place != replace(
            place, pin_budget=self._placement.place.pin_budget
        ):
            self._placement.detach()
            self._placement = None
        if self._module is None:
            from sagewan.model.linear import matrices

            logger.info("loading %s", self.name)
            self._module = self.load().eval().requires_grad_(False)
            self.weight_bytes = sum(x.nbytes for x in self._module.state_dict().values())
            self.formats = matrices(self._module)
            # What weights were quantised or cast from.
            give_back_heap()
        if self._worn != self.loras:
            self._wear()
        if self._placement is None:
            self._place(place)
        assert self._placement
        self._placement.enter()
        if moves:
            # The host's copies of what is on the device now.
            give_back_heap()
        return self._module

    def _place(self, place: Place) -> None:
        # The budget is one for all that are kept: of two experts, each would take the whole of it.
        place = replace(place, pin_budget=max(0, place.pin_budget - self.pinned_beside()))
        try:
            placement = Placement(self._module, self.blocks(self._module), place)
        except BaseException:
            # Half of it may be on the device: it is loaded again by whoever tries again.
            self.close()
            raise
        self._placement = placement
        self.pinned_bytes = placement.pinned_bytes
        self.unpinned_blocks = placement.swap.unpinned_blocks if placement.swap else 0
        self.refusal = placement.refusal

    def _wear(self) -> None:
        """Put its LoRAs on in place of those that are, all of it on the host."""
        from sagewan.checkpoint.lora import load_lora
        from sagewan.model.lora import Adapters

        if self._placement:
            self._placement.detach()
            self._placement = None
        try:
            self._adapters = self._adapters or Adapters(self._module)
            self._adapters.put(map(load_lora, self.loras))
        except BaseException:
            # Some of them may be on, and none of those before: the next run loads it anew.
            self.close()
            raise
        self._worn = self.loras


def _give_back(device: str) -> None:
    """What torch keeps of a GPU's memory for later is of more use to the next model."""
    if device != "cpu":
        torch.cuda.empty_cache()


class Loaded:
    """The models that runs share, and the encoded text and pictures of the last one.

    They stay loaded while the next run has the same; what it changes is loaded anew, and what it
    does not need is freed. With ``keeps=False``, for a single run, each is freed after its turn.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self._parts: dict[Hashable, Part] = {}
        self._conditions: tuple[Hashable, Conditions] | None = None

    def without_own(self, hardware: Hardware) -> Hardware:
        """The machine as if these held none of its memory, and had no context there."""
        if not self._parts or not hardware.usable:
            return hardware
        if not torch.cuda.is_initialized():
            return hardware
        cpu = hardware.cpu
        cpu = replace(cpu, memory_free=cpu.memory_free + self._pinned_bytes())
        held = [torch.cuda.memory_reserved(device.torch_name) for device in hardware.devices]
        devices = tuple(
            replace(device, memory_free=device.memory_free + own + CONTEXT * (own > 0))
            for device, own in zip(hardware.devices, held, strict=True)
        )
        return replace(hardware, devices=devices, cpu=cpu)

    def part(self, key: Hashable, part: Part) -> Part:
        """The part that is kept under this key, which names all that its weights depend on; else
        this one, kept from now on."""
        found = self._parts.setdefault(key, part)
        found.kept = self.keeps
        # What is loaded is the same, but the closures belong to the run.
        found.load, found.blocks = part.load, part.blocks
        found.pinned_beside = lambda: self._pinned_bytes(but=found)
        return found

    def only(self, keys: Sequence[Hashable]) -> None:
        """Free every part but these: another model, or other weights, are wanted now."""
        for key in [key for key in self._parts if key not in keys]:
            self._parts.pop(key).close()

    def leave_device(self) -> None:
        """Let every part leave the device."""
        for part in self._parts.values():
            part.leave()

    def _pinned_bytes(self, but: Part | None = None) -> int:
        """Bytes of host memory that its parts have pinned now."""
        held = [part.placement for part in self._parts.values() if part is not but]
        return sum(placement.pinned_bytes for placement in held if placement)

    def conditions(self, key: Hashable, encode: "Callable[[], Conditions]") -> "Conditions":
        """The conditions kept under this key, or those that ``encode`` gives."""
        if self._conditions is None or self._conditions[0] != key:
            self._conditions = None
            # The transformer may have stayed, in the room that the encoders want now.
            self.leave_device()
            found = encode()
            if not self.keeps:
                return found
            self._conditions = (key, found)
        return self._conditions[1]

    def close(self) -> None:
        """Free everything."""
        self._conditions = None
        for part in self._parts.values():
            part.close()
        self._parts.clear()
