"""What would fit where a plan does not: the fewest changes of the request, each the least."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sagewan.plan.budget.needs import Needs
from sagewan.plan.hardware import Hardware
from sagewan.plan.memory import plan_memory
from sagewan.plan.models import Model
from sagewan.plan.modes import MODES, Quality
from sagewan.plan.request import Request
from sagewan.plan.weights import QUANTIZED_AS, weight_bytes

# A video shorter or narrower than this is none.
_LEAST_FRAMES, _LEAST_SIDE = 5, 0.2


@dataclass(frozen=True)
class _Way:
    """Changes as they are said, and what is needed with them."""

    changes: tuple[str, ...]
    needs: Needs

    @property
    def said(self) -> str:
        first, *others = self.changes
        return f"{first} together with {' and '.join(others)}" if others else first


def advice(needs: Needs, hardware: Hardware) -> str:
    """A sentence's end: ways that fit, none of more changes than another; empty where there is
    none. ``--dtype`` comes before weights of fewer bits, as those do before a shorter or a smaller
    video."""
    ways = _Search(hardware).least(needs)
    return f"{' or '.join(way.said for way in ways)} would fit" if ways else ""


def smaller(model: Model, frames: int, grid_size: tuple[int, int]) -> str:
    """Flags for a video that takes about half the memory."""
    width, height = _scaled(model, grid_size, 0.7)
    return f"--frames {_half(frames)} or --size {width}x{height}"


@dataclass(frozen=True)
class _Search:
    hardware: Hardware

    def least(self, needs: Needs) -> list[_Way]:
        """The ways that fit with the fewest changes: the first that changes weights alone, and the
        first with another video."""
        possible = [way for way in _of_weights(needs) if self._fits(_least_video(way.needs))]
        for count in range(1, 5):
            ways = (way for way in possible if len(way.changes) == count and self._fits(way.needs))
            videos = (self._video(way, count - len(way.changes)) for way in possible)
            found = next(ways, None), next(filter(None, videos), None)
            if any(found):
                return [way for way in found if way]
        return []

    def _video(self, way: _Way, changes: int) -> _Way | None:
        """The longest or the largest video that fits, where one change is left; where two are, a
        shorter one as large as fits."""
        if changes == 1:
            found = [x for x in (self._last(_shorter(way)), self._last(_narrower(way))) if x]
            said = " or ".join(x.changes[-1] for x in found)
            return _Way((*way.changes, said), found[0].needs) if found else None
        frames = way.needs.frames if changes == 2 else 0
        while frames > _LEAST_FRAMES:
            frames = _half(frames)
            if largest := self._last(_narrower(_with_frames(way, frames))):
                return largest
        return None

    def _last(self, growing: Iterable[_Way]) -> _Way | None:
        """The last that fits of some that grow."""
        ways = list(growing)
        low, high = 0, len(ways)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._fits(ways[middle].needs) else (low, middle)
        return ways[low - 1] if low else None

    def _fits(self, needs: Needs) -> bool:
        return plan_memory(needs, self.hardware).fits


def _of_weights(needs: Needs) -> Iterator[_Way]:
    """The request as it is, and each way that it may have smaller weights, the most precise first;
    weights that are quantised while loading are whole on the host for a while, those of a file that
    was quantised once are not."""
    half = needs.device.usual_dtype if needs.on_device else "bfloat16"
    ways = [_Way((), needs)]
    if needs.dtype == "float32":
        # What float32 has no kernels for may run then, and takes more.
        quantised = needs.quantised_attention or (needs.on_device and not _exact(needs.request))
        in_half = replace(needs, dtype=half, quantised_attention=quantised)
        ways.append(_Way((f"--dtype {half}",), in_half))
    formats = [way for dtype in ways for way in _quantised(dtype)]
    yield from sorted((*ways, *formats), key=lambda way: len(way.changes))


def _exact(request: Request) -> bool:
    """Whether it names an attention in 16 bit, for all steps and layers."""
    ends = request.attention_ends
    named = (request.attention, *((ends.mode,) if ends else ()))
    return all(mode in MODES and MODES[mode].quality == Quality.EXACT for mode in named)


def _quantised(way: _Way) -> Iterator[_Way]:
    needs = way.needs
    if needs.model.quantized is not None:
        return
    for name, format_ in QUANTIZED_AS.items():
        less = weight_bytes(needs.model, needs.dtype, format_) < needs.weight_bytes
        packed = replace(needs, format=format_)
        if less:
            yield _Way((*way.changes, f"--quantization {name}"), packed)
        if less or format_ == needs.format:
            once = replace(packed, model=replace(needs.model, quantized=format_))
            made = f"a file that sagewan quantize --to {name} makes once"
            yield _Way((*way.changes, made), once)


def _least_video(needs: Needs) -> Needs:
    size = _scaled(needs.model, needs.grid_size, _LEAST_SIDE)
    return replace(needs, frames=min(needs.frames, _LEAST_FRAMES), grid_size=size)


def _shorter(way: _Way) -> Iterator[_Way]:
    for frames in range(_LEAST_FRAMES, way.needs.frames, 4):
        yield _with_frames(way, frames)


def _with_frames(way: _Way, frames: int) -> _Way:
    return _Way((*way.changes, f"--frames {frames}"), replace(way.needs, frames=frames))


def _narrower(way: _Way) -> Iterator[_Way]:
    needs = way.needs
    for hundredths in range(int(100 * _LEAST_SIDE), 100, 2):
        width, height = _scaled(needs.model, needs.grid_size, hundredths / 100)
        smaller_ = replace(needs, grid_size=(width, height))
        yield _Way((*way.changes, f"--size {width}x{height}"), smaller_)


def _half(frames: int) -> int:
    return max(_LEAST_FRAMES, (frames - 1) // 8 * 4 + 1)


def _scaled(model: Model, size: tuple[int, int], share: float) -> tuple[int, int]:
    """A size on the grid whose sides are no longer than this share."""
    width, height = (
        max(step, int(side * share) // step * step)
        for side, step in zip(size, model.grid, strict=True)
    )
    return width, height
