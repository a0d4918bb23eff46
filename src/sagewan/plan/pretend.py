"""Hardware that is not here: a plan can be made for the card one thinks of buying."""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from sagewan.errors import RequestError
from sagewan.plan.hardware import GIB, Device, Hardware
from sagewan.plan.request import unknown_choice

MAX_GIB = 1024.0

# (compute capability × 10, memory in GiB), from NVIDIA's tables.
CARDS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "rtx-3060": (86, 12),
        "rtx-3090": (86, 24),
        "rtx-4060": (89, 8),
        "rtx-4060-ti": (89, 16),
        "rtx-4070": (89, 12),
        "rtx-4080": (89, 16),
        "rtx-4090": (89, 24),
        "rtx-5060": (120, 8),
        "rtx-5060-ti": (120, 16),
        "rtx-5070": (120, 12),
        "rtx-5080": (120, 16),
        "rtx-5090": (120, 32),
        "a100": (80, 80),
        "l40s": (89, 48),
        "h100": (90, 80),
        "h200": (90, 141),
        "b200": (100, 180),
    }
)
# Where only an amount of memory is named and this machine has no card: the most common kind.
_USUAL = 89


def pretend(
    hardware: Hardware, *, gpu: str | None, vram: float | None, ram: float | None = None
) -> Hardware:
    """This machine, with one other GPU in place of its own, or other host memory; ``vram`` and
    ``ram`` in GiB.

    A ``gpu`` is a name of CARDS, or one like "NVIDIA GeForce RTX 4060 Ti". ``vram`` alone keeps the
    kind of card this machine has. The installed packages stay as they are. Raises RequestError for
    an unknown card or amount.
    """
    if ram is not None:
        hardware = _with_ram(hardware, ram)
    if gpu is None and vram is None:
        return hardware
    if gpu is not None:
        gpu = _known(gpu)
    if vram is not None and not 1 <= vram <= MAX_GIB:
        raise RequestError(f"vram={vram:g}: it must be from 1 to {MAX_GIB:g} (GiB)")
    own = hardware.devices[0].sm if hardware.devices else _USUAL
    sm, usual = CARDS[gpu] if gpu else (own, 0)
    memory = int((usual if vram is None else vram) * GIB)
    card = Device(
        name=f"{_written(gpu) if gpu else 'a GPU'} with {memory / GIB:g} GiB",
        sm=sm,
        memory_total=memory,
        memory_free=memory,
    )
    # A CPU build of torch would drive no GPU; whoever had the card would install the other.
    return replace(hardware, devices=(card,), torch_cuda=hardware.torch_cuda or "any")


def _known(gpu: str) -> str:
    """The name in CARDS, however it is spaced and spelt."""
    bare = _bare(gpu).removeprefix("nvidia").removeprefix("geforce")
    name = next((name for name in CARDS if _bare(name) == bare), None)
    if name is None:
        raise unknown_choice("gpu", gpu, CARDS)
    return name


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _written(gpu: str) -> str:
    """``rtx-4060-ti`` → ``RTX 4060 Ti``."""
    return gpu.upper().replace("-", " ").replace(" TI", " Ti")


# What the system and other programs take of a machine's memory.
_TAKEN = 2 * GIB


def _with_ram(hardware: Hardware, ram: float) -> Hardware:
    if not 1 <= ram <= MAX_GIB * 4:
        raise RequestError(f"ram={ram:g}: it must be from 1 to {MAX_GIB * 4:g} (GiB)")
    total = int(ram * GIB)
    cpu = replace(hardware.cpu, memory_total=total, memory_free=max(0, total - _TAKEN))
    return replace(hardware, cpu=cpu, memory_total=total)
