"""How little of a GPU the VAE goes in, with segments that are fixed or can grow."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.pipelines import T2V, TI2V, CutOffError
from benchmarks.random_models import random_vae
from benchmarks.watching import DEVICE, clear
from sagewan.model.vae import decode_pieces, decode_tiles
from sagewan.model.vae import encode as vae_encode
from sagewan.pipeline.decode import frame_bytes
from sagewan.pipeline.probe import probe
from sagewan.plan.budget.needs import Needs
from sagewan.plan.budget.stage import CONTEXT, Stage, with_overhead
from sagewan.plan.budget.vae import decode_stage, picture_stage
from sagewan.plan.decoding import EXACT
from sagewan.plan.hardware import GIB
from sagewan.plan.models import PUBLISHED, Model
from sagewan.plan.pretend import pretend
from sagewan.plan.request import Request


@dataclass(frozen=True)
class Shape:
    """What is decoded: a model's latents, whole or in tiles of cells."""

    name: str
    size: tuple[int, int]
    tile: tuple[int, int] | None

    @property
    def model(self) -> Model:
        return PUBLISHED[self.name]

    def needs(self, *, growing: bool) -> Needs:
        """What the plan's sum of it is made of, on a card with room for all."""
        return Needs(
            request=Request(prompt="x"),
            model=self.model,
            device=pretend(probe(), gpu=None, vram=80).devices[0],
            dtype="bfloat16",
            grid_size=self.size,
            frames=FRAMES,
            format=None,
            lora_bytes=0,
            quantised_attention=False,
            segments_grow=growing,
        )


# Of longer videos torch's allocator holds more.
FRAMES = 61
SHAPES = (
    Shape(T2V, (1280, 720), (90, 80)),
    Shape(T2V, (1280, 720), None),
    Shape(TI2V, (1280, 704), (44, 40)),
    Shape(T2V, (1280, 720), (45, 80)),
    Shape(T2V, (832, 480), None),
    Shape(TI2V, (1280, 704), (22, 40)),
    Shape(T2V, (1280, 720), (90, 54)),
    Shape(T2V, (960, 544), None),
    Shape(TI2V, (1280, 704), None),
    Shape(T2V, (1920, 1088), (68, 120)),
)
ENCODED = (
    Shape(T2V, (1280, 720), (45, 80)),
    Shape(T2V, (1280, 720), None),
    Shape(TI2V, (1280, 704), (22, 40)),
    Shape(TI2V, (1280, 704), None),
)
_ENCODED_FRAMES = 13
# How often the least is halved in on, between what is allocated and what would be held.
_HALVINGS = 2


def decode(modes: tuple[str, ...] = ("fixed", "growing")) -> dict[str, Any]:
    """Of each shape, GiB beyond the CUDA context: planned; allocated, held without a limit, and the
    least limit it went in, with its seconds; with fixed segments and with those that can grow."""
    found: list[dict[str, Any]] = []
    try:
        for shape in SHAPES:
            found.append({"model": shape.name, "size": shape.size, "tile": shape.tile})
            for mode in modes:
                with _segments(growing=mode == "growing"):
                    found[-1][mode] = _least(shape, shape.needs(growing=mode == "growing"))
            print(found[-1], flush=True)
    except CutOffError:
        return {"shapes": found, "cut off": True}
    return {"shapes": found}


def decode_speed() -> dict[str, Any]:
    """Seconds to decode 81 frames of 832×480, with fixed segments and with those that can grow in
    turns, each from an empty cache as in a run; the first of each chooses and loads kernels."""
    seconds: dict[str, list[float]] = {"fixed": [], "growing": []}
    shape = Shape(T2V, (832, 480), None)
    for mode in (*seconds,) * 5:
        with _segments(growing=mode == "growing"):
            needs = replace(shape.needs(growing=mode == "growing"), frames=81)
            vae = random_vae(shape.model, needs.decoding).eval().to(DEVICE)
            latents = torch.randn(1, shape.model.latent_channels, *needs.shape, device=DEVICE)
            seconds[mode].append(round(_decoded(latents.to(vae.dtype), vae, None)[0], 3))
            del vae
    return {"seconds": seconds, "least": {mode: min(found) for mode, found in seconds.items()}}


def encode() -> dict[str, Any]:
    """As :func:`decode`, of the VAE's encoder, which is in float32, and segments that can grow."""
    found: list[dict[str, Any]] = []
    try:
        for shape in ENCODED:
            found.append({"model": shape.name, "size": shape.size, "tile": shape.tile})
            with _segments(growing=True):
                needs = shape.needs(growing=True)
                vae = random_vae(shape.model, EXACT).eval().to(DEVICE)
                run = partial(_encoded, vae, shape)
                found[-1]["growing"] = _least_of(run, picture_stage(needs, shape.tile))
                del vae, run
            print(found[-1], flush=True)
    except CutOffError:
        return {"shapes": found, "cut off": True}
    return {"shapes": found}


def _least(shape: Shape, needs: Needs) -> dict[str, Any]:
    vae = random_vae(shape.model, needs.decoding).eval().to(DEVICE)
    latents = torch.randn(1, shape.model.latent_channels, *needs.shape, device=DEVICE)
    run = partial(_decoded, latents.to(vae.dtype), vae, shape.tile)
    return _least_of(run, decode_stage(needs, shape.tile))


def _least_of(run: Callable[[], tuple[float, float, float]], stage: Stage) -> dict[str, Any]:
    weights, active = (item.device / GIB for item in stage.items[:2])
    planned = (with_overhead(stage, on_device=True).device - CONTEXT) / GIB
    try:
        seconds, allocated, held = run()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}  # others have the rest of the GPU
    tried: dict[float, float | None] = {round(held, 3): round(seconds, 2)}

    def goes_in(gib: float) -> bool:
        with _limited(gib):
            try:
                tried[round(gib, 3)] = round(run()[0], 2)
            except torch.OutOfMemoryError:
                tried[round(gib, 3)] = None
        return tried[round(gib, 3)] is not None

    low, high = allocated, held
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if goes_in(middle) else (middle, high)
    gib = {"vae": weights, "activations": active, "planned": planned, "allocated": allocated}
    return {
        **{name: round(value, 3) for name, value in {**gib, "held": held, "least": high}.items()},
        "seconds": {str(gib): tried[gib] for gib in sorted(tried)},
        "goes in what is planned": goes_in(planned),
    }


def _encoded(vae: Any, shape: Shape) -> tuple[float, float, float]:
    width, height = shape.size

    def frames(start: int, stop: int) -> Tensor:
        return torch.zeros(1, 3, stop - start, height, width, device=DEVICE)

    with _measured() as found, torch.inference_mode():
        vae_encode(frames, _ENCODED_FRAMES, vae, shape.tile)
    return found[0], found[1], found[2]


def _decoded(latents: Tensor, vae: Any, tile: tuple[int, int] | None) -> tuple[float, float, float]:
    """Seconds, GiB allocated, GiB held."""
    with _measured() as found, torch.inference_mode():
        if tile is None:
            for piece in decode_pieces(latents, vae):
                frame_bytes(piece)
        else:
            for _, _, piece in decode_tiles(latents, vae, tile):
                frame_bytes(piece).cpu()
    return found[0], found[1], found[2]


@contextmanager
def _measured() -> Iterator[list[float]]:
    """Seconds, GiB allocated and GiB held of the block, once it is over."""
    clear()
    began, found = time.perf_counter(), list[float]()
    yield found
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    found += [time.perf_counter() - began, *(nbytes / GIB for nbytes in held)]


@contextmanager
def _limited(gib: float) -> Iterator[None]:
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _segments(*, growing: bool) -> Iterator[None]:
    # There is no public way once CUDA is in use.
    change = torch._C._accelerator_setAllocatorSettings  # type: ignore[attr-defined] # noqa: SLF001
    clear()
    change(f"expandable_segments:{growing}")
    try:
        yield
    finally:
        clear()
        change("expandable_segments:False")
