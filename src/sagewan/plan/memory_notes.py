"""What the user should know of the memory a plan takes, and what would take less, in sentences."""

from collections.abc import Iterator

from sagewan.plan.advice import advice
from sagewan.plan.budget.needs import Needs
from sagewan.plan.hardware import GIB, Hardware
from sagewan.plan.memory import LEAST_SWAP, MemoryPlan


def memory_notes(
    needs: Needs, memory: MemoryPlan, hardware: Hardware, preset_swap: int | None
) -> Iterator[str]:
    """What the user should know of it, in sentences."""
    device, asked = needs.device, needs.request.block_swap
    if not memory.on_device:
        if asked:
            yield f"block_swap={asked} changes nothing on a CPU: every weight is in its memory"
        # Against all of its memory: what is free changes from run to run, and the plan, which is in
        # the video's file, is to be the same for the same request.
        if 0 < hardware.memory_total < memory.host_peak:
            yield (
                f"this will not fit: it takes {memory.host_peak / GIB:.1f} GiB of memory, and this "
                f"machine has {hardware.memory_total / GIB:.1f}; "
                f"{_way_out(needs, memory, hardware)}"
            )
        return
    if asked and memory.block_swap == asked < LEAST_SWAP:
        yield f"block_swap={asked} saves nothing: two buffers take the place of the swapped blocks"
    if asked is not None and memory.block_swap > asked:
        yield (
            f"{memory.block_swap} blocks are swapped, not {asked}: with fewer this would not fit "
            f"{device.name}"
        )
    if asked is None and preset_swap is not None and memory.block_swap > preset_swap:
        yield (
            f"{memory.block_swap} blocks are swapped, more than the preset's {preset_swap}: "
            f"{device.name} needs it for this size and length"
        )
    if not memory.fits_device:
        yield f"this will not fit: {_too_large(needs, memory)}; {_way_out(needs, memory, hardware)}"
    elif not memory.fits_host:
        yield (
            f"this will not fit: it takes {memory.host_peak / GIB:.1f} GiB of host memory, and "
            f"{memory.host_room / GIB:.1f} GiB are free; {_way_out(needs, memory, hardware)}"
        )


def _way_out(needs: Needs, memory: MemoryPlan, hardware: Hardware) -> str:
    found = advice(needs, hardware)
    text = next(stage for stage in memory.stages if stage.name == "text")
    if found or memory.fits_device or text.device <= memory.room:
        return found or "choose a smaller model"
    return (
        f"the text alone takes {text.device / GIB:.1f} GiB, however small the video: use a larger "
        "card, or --device cpu"
    )


def _too_large(needs: Needs, memory: MemoryPlan) -> str:
    worst = max(memory.stages, key=lambda stage: stage.device)
    swapped = worst.name in ("text", "denoise")
    how = "with every block swapped" if swapped else "in the smallest tiles"
    return (
        f"{worst.name} takes {worst.device / GIB:.1f} GiB even {how}, "
        f"{needs.device.name} has {memory.room / GIB:.1f} GiB for it"
    )
