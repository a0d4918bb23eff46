"""What the user should know of the memory a plan takes, and what would take less, in sentences."""

from collections.abc import Iterator
from dataclasses import replace

from sagewan.plan.budget.needs import Needs
from sagewan.plan.hardware import GIB, Hardware
from sagewan.plan.linear import E4M3
from sagewan.plan.memory import LEAST_SWAP, MemoryPlan, plan_memory
from sagewan.plan.models import Model
from sagewan.plan.weights import weight_bytes


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
                f"machine has {hardware.memory_total / GIB:.1f}; {_host_advice(needs, hardware)}"
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
        text = next(stage for stage in memory.stages if stage.name == "text")
        advice = (
            f"the text alone takes {text.device / GIB:.1f} GiB, however small the video: use a "
            "larger card, or --device cpu"
            if text.device > memory.room
            else _advice(needs, hardware)
        )
        yield f"this will not fit: {_too_large(needs, memory)}; {advice}"
    elif not memory.fits_host:
        yield (
            f"this will not fit: it takes {memory.host_peak / GIB:.1f} GiB of host memory, and "
            f"{memory.host_room / GIB:.1f} GiB are free; {_host_advice(needs, hardware)}"
        )


def smaller(model: Model, frames: int, grid_size: tuple[int, int]) -> str:
    """Flags for a video that takes about half the memory."""
    less = max(5, (frames - 1) // 8 * 4 + 1)
    width, height = (
        _near(side * 0.7, step) for side, step in zip(grid_size, model.grid, strict=True)
    )
    return f"--frames {less} or --size {width}x{height}"


def _too_large(needs: Needs, memory: MemoryPlan) -> str:
    worst = max(memory.stages, key=lambda stage: stage.device)
    swapped = worst.name in ("text", "denoise")
    how = "with every block swapped" if swapped else "in the smallest tiles"
    return (
        f"{worst.name} takes {worst.device / GIB:.1f} GiB even {how}, "
        f"{needs.device.name} has {memory.room / GIB:.1f} GiB for it"
    )


def _advice(needs: Needs, hardware: Hardware) -> str:
    """What would fit, at the same settings or with a smaller model."""
    fitting = _fitting(needs, hardware)
    if fitting:
        return f"{fitting} would fit"
    return "choose a smaller model" + ("" if needs.packed else ", or --quantization fp4_scaled")


def _fitting(needs: Needs, hardware: Hardware) -> str:
    """Flags for fewer frames, or a smaller size, that fit; empty if none do."""
    model = needs.model

    def shorter(frames: int) -> Needs:
        return replace(needs, frames=frames)

    def narrower(hundredths: int) -> Needs:
        width, height = (
            _near(side * hundredths / 100, step)
            for side, step in zip(needs.grid_size, model.grid, strict=True)
        )
        return replace(needs, grid_size=(width, height))

    lengths = [shorter(frames) for frames in range(5, needs.frames, 4)]
    sizes = [narrower(hundredths) for hundredths in range(20, 100, 2)]
    found = (_largest_fitting(many, hardware) for many in (lengths, sizes))
    short, narrow = found
    said = [f"--frames {short.frames}"] if short else []
    said += ["--size {}x{}".format(*narrow.grid_size)] if narrow else []
    return " or ".join(said)


def _host_advice(needs: Needs, hardware: Hardware) -> str:
    """What would need less of the host: 16 bit; a file that is quantised already, as weights are
    whole on the host while they are quantised, or made 16 bit; a smaller video on a CPU."""
    once = "quantize the model once with sagewan quantize: the file it makes needs less"

    def fits(other: Needs) -> bool:
        return plan_memory(other, hardware).fits_host

    if needs.dtype == "float32" and fits(_in_bfloat16(needs)):
        return "--dtype bfloat16 needs half"
    if needs.packed and not needs.file_backed and fits(replace(needs, file_backed=True)):
        return once
    if not needs.packed:
        eight = weight_bytes(needs.model, needs.dtype, E4M3)
        quantised = replace(needs, weight_bytes=eight, packed=True, file_backed=False)
        if fits(quantised):
            return "--quantization fp8_scaled needs half"
        if fits(replace(quantised, file_backed=True)):
            return once
    fitting = "" if needs.device.is_cuda else _fitting(needs, hardware)
    if fitting:
        return f"{fitting} would fit"
    return "choose a smaller model"


def _in_bfloat16(needs: Needs) -> Needs:
    """The same with --dtype bfloat16, which packed weights don't ask about; plain ones stay in
    their file's pages if that has it."""
    if needs.packed:
        return replace(needs, dtype="bfloat16")
    backed = not needs.model.made_anew("transformer", "bfloat16")
    half = needs.weight_bytes // 2
    return replace(needs, dtype="bfloat16", weight_bytes=half, file_backed=backed)


def _largest_fitting(many: list[Needs], hardware: Hardware) -> Needs | None:
    """The last that fits of some that grow."""
    low, high = 0, len(many)
    while low < high:
        middle = (low + high) // 2
        if plan_memory(many[middle], hardware).fits:
            low = middle + 1
        else:
            high = middle
    return many[low - 1] if low else None


def _near(side: float, grid: int) -> int:
    return max(grid, int(side) // grid * grid)
