"""One stage's sum, and what every stage has: the process, and on a GPU its context."""

from dataclasses import dataclass, replace

from sagewan.plan.hardware import MIB

# A CUDA context with its kernels, and what stays of cuBLAS's workspaces in torch's cache: together
# 1.061 GiB between two runs (H100, torch 2.11+cu130), of which 0.69 to 0.77 were not torch's.
CONTEXT = 768 * MIB
WORKSPACE = 320 * MIB
# What the caching allocator can't use for its blocks' sizes, of all that a stage allocates beyond
# its weights (H100).
FRAGMENTATION = 0.06
# Python, torch, its libraries and the models' code, on the host: 1.2 to 1.5 GiB (H100).
PROCESS = 1408 * MIB
# Weights go to a GPU through two pinned buffers of this size, which torch keeps for the next.
UPLOAD = 32 * MIB
UPLOADS = 2


@dataclass(frozen=True)
class Item:
    """One line of the sum, in bytes; ``pinned`` is the part of ``host`` that can't be paged out,
    ``mapped`` the part that is a file's pages, which the system can take back at any time."""

    name: str
    device: int = 0
    host: int = 0
    pinned: int = 0
    mapped: int = 0


@dataclass(frozen=True)
class Stage:
    """What is in memory at once while one part of the run works; ``lost`` is what the allocator and
    libraries take beside the activations, as a share of them."""

    name: str
    items: tuple[Item, ...]
    lost: float = FRAGMENTATION

    @property
    def device(self) -> int:
        return sum(item.device for item in self.items)

    @property
    def host(self) -> int:
        """Bytes that must be there: the pages of files are not counted."""
        return sum(item.host for item in self.items)

    @property
    def pinned(self) -> int:
        return sum(item.pinned for item in self.items)


def with_overhead(stage: Stage, *, on_device: bool) -> Stage:
    """The stage with what every one has: the process, and on a GPU its context."""
    host = Item("process", 0, PROCESS)
    if not on_device:
        return replace(stage, items=(*stage.items, host))
    moving = sum(item.device for item in stage.items if item.name == "activations")
    return replace(
        stage,
        items=(
            *stage.items,
            Item("workspaces and fragmentation", int(stage.lost * moving)),
            Item("CUDA context and libraries", CONTEXT + WORKSPACE),
            Item("buffers of copies", 0, UPLOADS * UPLOAD, UPLOADS * UPLOAD),
            host,
        ),
    )


def placed(name: str, device: int, host: int, *, on_device: bool) -> tuple[Item, ...]:
    return (Item(name, device, host),) if on_device else (Item(name, 0, device + host),)


def where(nbytes: int, *, on_device: bool) -> tuple[int, int]:
    return (nbytes, 0) if on_device else (0, nbytes)
