"""What is where, decided from the budget: swapped blocks, chunks, tiles, the text encoder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

from sagewan.plan import budget
from sagewan.plan.budget import GIB, UMT5_BLOCKS, Chunks, Item, Stage, Weights
from sagewan.plan.decoding import Decoding, plan_decoding
from sagewan.plan.evidence import Shortage
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.models import Model
from sagewan.plan.request import Request

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
class Needs:
    """What the sums are made of. ``weight_bytes`` are those of one transformer, ``lora_bytes`` of
    what lies beside them; the size is (width, height), on the grid. A step makes a pass for each of
    ``texts``. ``packed`` weights are unpacked, one matrix at a time, by some rows; ``file_backed``
    ones stay in the pages of their files where they are not pinned; ``keeps_residuals`` says that a
    step cache keeps what the blocks add, for each text."""

    request: Request
    model: Model
    device: Device
    dtype: str
    grid_size: tuple[int, int]
    frames: int
    tokens: int
    weight_bytes: int
    lora_bytes: int
    quantised_attention: bool
    texts: int = 1
    packed: bool = False
    file_backed: bool = True
    keeps_residuals: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where everything is. Tiles are (rows, columns) of latent cells, None for whole frames.

    ``block_swap`` of each transformer's blocks wait in host memory, ``pin_budget`` bytes of which
    may be pinned; ``chunks`` is how its blocks compute; ``text_keys`` are the bytes of the text's
    keys and values, kept from the first step on, 0 where each step computes them; ``text_swap`` of
    the text encoder's blocks are swapped, through ``text_pin_budget`` bytes of pinned memory;
    ``stays``: the transformer stays on the device while a session decodes.
    ``stages`` are the sums; ``room`` and ``host_room`` what they must fit in.
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
        encode_tile, decode_tile = self._encode_tile(), self._decode_tile()
        stays = self._stays(swap, decode_tile)
        draft = MemoryPlan(
            block_swap=swap,
            pin_budget=self._pin_budget,
            chunks=chunks,
            text_keys=self._text_keys(chunks, swap),
            text_swap=text_swap,
            text_pin_budget=min(self._pin_budget, budget.text_staging(text_swap, self._number)),
            encode_tile=encode_tile,
            decode_tile=decode_tile,
            stays=stays,
            stages=(),
            room=self._room,
            host_room=self.hardware.cpu.memory_free,
            on_device=self._on_device,
        )
        stages = tuple(self._with_overhead(stage) for stage in self._stages(draft))
        return replace(draft, stages=stages)

    def _stages(self, draft: MemoryPlan) -> Iterator[Stage]:
        needs, model = self.needs, self.needs.model
        yield budget.text_stage(model, self._number, draft.text_swap, on_device=self._on_device)
        if needs.request.image:
            yield budget.picture_stage(
                model, self._cells, draft.encode_tile, on_device=self._on_device
            )
        yield self._denoise(draft.chunks, draft.block_swap, draft.text_keys)
        staying = self._resident(draft.block_swap) if draft.stays else 0
        yield budget.decode_stage(
            model,
            self._shape,
            draft.decode_tile,
            on_device=self._on_device,
            staying=staying,
            decoding=self._decoding,
        )

    @property
    def _on_device(self) -> bool:
        return self.needs.device.is_cuda

    @property
    def _room(self) -> int:
        """Bytes of the device to plan with: less after each shortage."""
        device = self.needs.device
        free = min(device.memory_free, max(0, device.memory_total - RESERVED))
        for _ in self.shortages:
            free = int(free * _AFTER_SHORTAGE)
        return max(0, free)

    @property
    def _limited(self) -> bool:
        return self._on_device and self.needs.device.memory_free > 0

    @property
    def _number(self) -> int:
        """Bytes of a number in the plan's dtype."""
        return 4 if self.needs.dtype == "float32" else 2

    @property
    def _decoding(self) -> Decoding:
        return plan_decoding(self.needs.device, self.needs.dtype, self.needs.grid_size)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        needs, model = self.needs, self.needs.model
        width, height = needs.grid_size
        frames = (needs.frames - 1) // model.temporal + 1
        return frames, height // model.spatial, width // model.spatial

    @property
    def _cells(self) -> tuple[int, int]:
        return self._shape[1:]

    @property
    def _pin_budget(self) -> int:
        total, free = self.hardware.memory_total, self.hardware.cpu.memory_free
        if not self._on_device or not total:
            return 0
        share = _PIN_SHARE.get(self.hardware.system, _USUAL_PIN_SHARE)
        copies = budget.UPLOADS * budget.UPLOAD
        return max(0, int(min(share * total, free - budget.PROCESS)) - copies)

    def _with_overhead(self, stage: Stage) -> Stage:
        return budget.with_overhead(stage, on_device=self._on_device)

    def _fits(self, stage: Stage) -> bool:
        return not self._limited or self._with_overhead(stage).device <= self._room

    def _text_swap(self) -> int:
        """The fewest of the text encoder's blocks that must be swapped, or all."""
        if self.needs.model.is_demo or not self._on_device:
            return 0
        if self._short("text"):
            return UMT5_BLOCKS
        counts: list[int] = [0, *range(LEAST_SWAP, UMT5_BLOCKS)]
        for swapped in counts:
            if self._fits(
                budget.text_stage(self.needs.model, self._number, swapped, on_device=True)
            ):
                return swapped
        return UMT5_BLOCKS

    def _encode_tile(self) -> tuple[int, int] | None:
        model, cells = self.needs.model, self._cells
        return self._tile(
            "picture", lambda tile: budget.picture_stage(model, cells, tile, on_device=True)
        )

    def _decode_tile(self) -> tuple[int, int] | None:
        model, shape = self.needs.model, self._shape
        return self._tile(
            "decode",
            lambda tile: budget.decode_stage(
                model, shape, tile, on_device=True, decoding=self._decoding
            ),
        )

    def _tile(
        self, name: str, stage: Callable[[tuple[int, int] | None], Stage]
    ) -> tuple[int, int] | None:
        """The largest tile whose stage fits, half of what was too much before; None is all."""
        short = self._short(name)
        if short is None and self._fits(stage(None)):
            return None
        most = prod(short.tile or self._cells) // 2 if short else prod(self._cells)
        sizes = [size for size in budget.tile_sizes(self._cells) if prod(size) <= most]
        fitting = (size for size in sizes[:-1] if self._fits(stage(size)))
        return next(fitting, budget.tile_sizes(self._cells)[-1])

    def _chunks_and_swap(self) -> tuple[Chunks, int]:
        """Roomy chunks where they fit and nothing is swapped; else the usual ones and as few
        swapped blocks as fit; small chunks where none do."""
        needs, layers = self.needs, self.needs.model.layers
        asked = min(needs.request.block_swap or 0, layers)
        usual = budget.usual_chunks(needs.model, needs.tokens)
        short = self._short("denoise")
        if not self._on_device:
            return usual, 0
        if short:
            usual = budget.small_chunks()
            asked = min(layers, max(asked, short.block_swap + max(LEAST_SWAP, layers // 4)))
        roomy = budget.roomy_chunks(needs.tokens)
        if not short and not asked and self._fits(self._denoise(roomy, 0)):
            return roomy, 0
        counts = [n for n in range(layers + 1) if n >= asked and (n == asked or n >= LEAST_SWAP)]
        for chunks in (usual, budget.small_chunks()):
            for swap in counts:
                if self._fits(self._denoise(chunks, swap)):
                    return chunks, swap
        return budget.small_chunks(), layers

    def _text_keys(self, chunks: Chunks, swap: int) -> int:
        """Bytes of the text's keys and values, if there is room for them and for all blocks."""
        needs = self.needs
        nbytes = budget.text_keys_bytes(needs.model, needs.texts, self._number)
        stage = self._denoise(chunks, swap, nbytes)
        if not self._on_device:
            # Of all of its memory: what is free changes from run to run.
            total = self.hardware.memory_total
            return nbytes if not total or self._with_overhead(stage).host <= total else 0
        return nbytes if not swap and self._fits(stage) and not self._short("denoise") else 0

    def _short(self, stage: str) -> Shortage | None:
        """The last shortage of a stage, if there was one."""
        return next((short for short in reversed(self.shortages) if short.stage == stage), None)

    def _stays(self, swap: int, tile: tuple[int, int] | None) -> bool:
        """Whether the transformer can stay while the VAE decodes; one of two experts leaves."""
        if self.needs.model.experts > 1 or not self._on_device:
            return False
        stage = budget.decode_stage(
            self.needs.model,
            self._shape,
            tile,
            on_device=True,
            staying=self._resident(swap),
            decoding=self._decoding,
        )
        return self._fits(stage)

    @property
    def _weights(self) -> Weights:
        return Weights.of(self.needs.model, self.needs.weight_bytes, self._number)

    def _resident(self, swap: int) -> int:
        """Bytes of the transformer on the device, its two buffers included."""
        weights, layers = self._weights, self.needs.model.layers
        return weights.around + (layers - swap + min(2, swap)) * weights.block

    def _denoise(self, chunks: Chunks, swap: int, text_keys: int = 0) -> Stage:
        needs, model = self.needs, self.needs.model
        weights = self._weights
        active = budget.activations(
            model, needs.tokens, self._number, chunks, quantised=needs.quantised_attention
        )
        if needs.packed:
            active += model.ffn * model.heads * model.head_dim * self._number
        active += budget.conditions_bytes(model, self._shape, self._number)
        resident = self._resident(swap)
        kept = 0
        if needs.keeps_residuals:
            kept = needs.texts * needs.tokens * model.heads * model.head_dim * self._number
        if not self._on_device:
            return Stage(
                "denoise",
                (
                    Item("transformer", 0, resident),
                    Item("step cache", 0, kept),
                    Item("text keys and values", 0, text_keys),
                    Item("activations", 0, active),
                ),
            )
        waiting = swap * weights.block
        pinned = min(waiting, self._pin_budget)
        # Weights that are quantised or cast while loading are whole on the host for a moment.
        host = pinned if needs.file_backed else max(waiting, needs.weight_bytes)
        return Stage(
            "denoise",
            (
                Item("transformer", resident, host, pinned, max(0, waiting - host)),
                Item("LoRAs", needs.lora_bytes),
                Item("step cache", kept),
                Item("text keys and values", text_keys),
                Item("activations", active),
            ),
        )
