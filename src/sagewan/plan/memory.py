"""What is where, decided from the budget: swapped blocks, chunks, tiles, the text encoder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from sagewan.plan.budget.denoise import Layout, denoise_stage, resident_bytes
from sagewan.plan.budget.needs import Needs
from sagewan.plan.budget.stage import PROCESS, UPLOAD, UPLOADS, Stage, with_overhead
from sagewan.plan.budget.text import UMT5_BLOCKS, text_stage, text_staging
from sagewan.plan.budget.transformer import (
    Chunks,
    roomy_chunks,
    small_chunks,
    text_keys_bytes,
    usual_chunks,
)
from sagewan.plan.budget.vae import decode_stage, picture_stage, tile_sizes
from sagewan.plan.evidence import Shortage
from sagewan.plan.hardware import GIB, Hardware

# Of the host's memory, how much may be pinned: Windows itself allows about half.
_PIN_SHARE = {"Windows": 0.45}
_USUAL_PIN_SHARE = 0.7
# What a desktop and other programs hold of a card, beside what they hold now.
RESERVED = GIB // 2
# Two buffers take the place of the swapped blocks, so one or two save nothing.
LEAST_SWAP = 3
# What each shortage takes of the memory that is counted on.
_AFTER_SHORTAGE = 0.85


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where everything is. Tiles are (rows, columns) of latent cells, None for whole frames.

    ``block_swap`` of each transformer's blocks wait in host memory, ``pin_budget`` bytes of which
    may be pinned; ``chunks`` is how its blocks compute; ``text_keys`` are the bytes of the text's
    keys and values, kept from the first step on, 0 where each step computes them; ``text_swap`` of
    the text encoder's blocks are swapped, through ``text_pin_budget`` bytes of pinned memory;
    ``stays``: the transformer stays on the device while a session decodes.
    ``stages`` are the sums; ``room`` and ``host_room`` what they must fit in; ``segments_grow``:
    they count on segments of the device's memory that can grow.
    """

    block_swap: int
    pin_budget: int
    chunks: Chunks
    text_keys: int
    text_swap: int
    text_pin_budget: int
    encode_tile: tuple[int, int] | None
    decode_tile: tuple[int, int] | None
    stays: bool
    stages: tuple[Stage, ...]
    room: int
    host_room: int
    on_device: bool
    segments_grow: bool

    @property
    def device_peak(self) -> int:
        """The most bytes of the device at once; 0 on a CPU."""
        return max(stage.device for stage in self.stages) if self.on_device else 0

    @property
    def host_peak(self) -> int:
        """The most bytes of the host at once that are no file's pages."""
        return max(stage.host for stage in self.stages)

    @property
    def pinned(self) -> int:
        """The most pinned bytes of the host at once."""
        return max(stage.pinned for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        return not self.on_device or self.device_peak <= self.room

    @property
    def fits_host(self) -> bool:
        return not self.host_room or self.host_peak <= self.host_room


def plan_memory(
    needs: Needs, hardware: Hardware, shortages: tuple[Shortage, ...] = ()
) -> MemoryPlan:
    """Decide what is where; a plan that does not fit is the nearest one to fitting.

    ``needs.request.block_swap`` is the least that is swapped. A device whose memory is not known is
    taken to have enough.
    """
    return _Planner(needs, hardware, shortages).decide()


@dataclass(frozen=True)
class _Planner:
    needs: Needs
    hardware: Hardware
    shortages: tuple[Shortage, ...]

    def decide(self) -> MemoryPlan:
        text_swap = self._text_swap()
        chunks, swap = self._chunks_and_swap()
        layout = Layout(chunks=chunks, swap=swap, pin_budget=self._pin_budget)
        layout = replace(layout, text_keys=self._text_keys(layout))
        encode_tile, decode_tile = self._encode_tile(), self._decode_tile()
        stays = self._stays(swap, decode_tile)
        staying = resident_bytes(self.needs, swap) if stays else 0
        stages = [text_stage(self.needs, text_swap)]
        stages += [picture_stage(self.needs, encode_tile)] if self.needs.request.image else []
        stages.append(denoise_stage(self.needs, layout))
        stages.append(decode_stage(self.needs, decode_tile, staying))
        staging = text_staging(text_swap, self.needs.number_bytes)
        return MemoryPlan(
            block_swap=swap,
            pin_budget=self._pin_budget,
            chunks=chunks,
            text_keys=layout.text_keys,
            text_swap=text_swap,
            text_pin_budget=min(self._pin_budget, staging),
            encode_tile=encode_tile,
            decode_tile=decode_tile,
            stays=stays,
            stages=tuple(self._with_overhead(stage) for stage in stages),
            room=self._room,
            host_room=self.hardware.cpu.memory_free,
            on_device=self.needs.on_device,
            segments_grow=self.needs.on_device and self.needs.segments_grow,
        )

    def _denoise(self, chunks: Chunks, swap: int) -> Stage:
        layout = Layout(chunks=chunks, swap=swap, pin_budget=self._pin_budget)
        return denoise_stage(self.needs, layout)

    @property
    def _room(self) -> int:
        """Bytes of the device to plan with: less after each shortage."""
        device = self.needs.device
        free = min(device.memory_free, max(0, device.memory_total - RESERVED))
        for _ in self.shortages:
            free = int(free * _AFTER_SHORTAGE)
        return max(0, free)

    @property
    def _pin_budget(self) -> int:
        total, free = self.hardware.memory_total, self.hardware.cpu.memory_free
        if not self.needs.on_device or not total:
            return 0
        share = _PIN_SHARE.get(self.hardware.system, _USUAL_PIN_SHARE)
        return max(0, int(min(share * total, free - PROCESS)) - UPLOADS * UPLOAD)

    def _with_overhead(self, stage: Stage) -> Stage:
        return with_overhead(stage, on_device=self.needs.on_device)

    def _fits(self, stage: Stage) -> bool:
        # A device whose memory is not known has enough.
        limited = self.needs.on_device and self.needs.device.memory_free > 0
        return not limited or self._with_overhead(stage).device <= self._room

    def _short(self, stage: str) -> Shortage | None:
        """The last shortage of a stage, if there was one."""
        return next((short for short in reversed(self.shortages) if short.stage == stage), None)

    def _text_swap(self) -> int:
        """The fewest of the text encoder's blocks that must be swapped, or all."""
        if self.needs.model.is_demo or not self.needs.on_device:
            return 0
        if self._short("text"):
            return UMT5_BLOCKS
        counts = (0, *range(LEAST_SWAP, UMT5_BLOCKS))
        return next((n for n in counts if self._fits(text_stage(self.needs, n))), UMT5_BLOCKS)

    def _encode_tile(self) -> tuple[int, int] | None:
        return self._tile("picture", partial(picture_stage, self.needs))

    def _decode_tile(self) -> tuple[int, int] | None:
        return self._tile("decode", partial(decode_stage, self.needs))

    def _tile(
        self, name: str, stage: Callable[[tuple[int, int] | None], Stage]
    ) -> tuple[int, int] | None:
        """The largest tile whose stage fits, half of what was too much before; None is all."""
        short, cells = self._short(name), self.needs.cells
        if short is None and self._fits(stage(None)):
            return None
        smallest = tile_sizes(cells)[-1]
        if not self._fits(stage(smallest)):
            return smallest
        most = prod(short.tile or cells) // 2 if short else prod(cells)
        sizes = (size for size in tile_sizes(cells) if prod(size) <= most)
        return next((size for size in sizes if self._fits(stage(size))), smallest)

    def _chunks_and_swap(self) -> tuple[Chunks, int]:
        """Roomy chunks where they fit and nothing is swapped; else the usual ones and as few
        swapped blocks as fit; small chunks where none do."""
        needs, layers = self.needs, self.needs.model.layers
        asked = min(needs.request.block_swap or 0, layers)
        usual, roomy = usual_chunks(needs.model, needs.tokens), roomy_chunks(needs.tokens)
        short = self._short("denoise")
        if not needs.on_device:
            return usual, 0
        if short:
            usual = small_chunks()
            asked = min(layers, max(asked, short.block_swap + max(LEAST_SWAP, layers // 4)))
        if not short and not asked and self._fits(self._denoise(roomy, 0)):
            return roomy, 0
        counts = [n for n in range(layers + 1) if n >= asked and (n == asked or n >= LEAST_SWAP)]
        for chunks in (usual, small_chunks()):
            for swap in counts:
                if self._fits(self._denoise(chunks, swap)):
                    return chunks, swap
        return small_chunks(), layers

    def _text_keys(self, layout: Layout) -> int:
        """Bytes of the text's keys and values, if there is room for them and for all blocks."""
        needs = self.needs
        nbytes = text_keys_bytes(needs.model, needs.texts, needs.number_bytes)
        stage = denoise_stage(needs, replace(layout, text_keys=nbytes))
        if not needs.on_device:
            # Of all of its memory: what is free changes from run to run.
            total = self.hardware.memory_total
            return nbytes if not total or self._with_overhead(stage).host <= total else 0
        kept = not layout.swap and not self._short("denoise") and self._fits(stage)
        return nbytes if kept else 0

    def _stays(self, swap: int, tile: tuple[int, int] | None) -> bool:
        """Whether the transformer can stay while the VAE decodes; one of two experts leaves."""
        if self.needs.model.experts > 1 or not self.needs.on_device:
            return False
        return self._fits(decode_stage(self.needs, tile, resident_bytes(self.needs, swap)))
