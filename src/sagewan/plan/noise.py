"""The noise of each step, as plain numbers: which of two experts has it is known before a run.

The same grids as the schedulers of :mod:`sagewan.pipeline.schedulers`, which a test compares: a
flow's noise level σ goes from 1 to 0, shifted towards the noisy end, and its time is σ of 1000.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

# Wan counts time from 0 to 1000 at every stage of its life.
TRAIN_STEPS = 1000
_LAST = 1 / TRAIN_STEPS


def step_times(scheduler: str, *, shift: float, steps: int) -> tuple[float, ...]:
    """The time of each step, from 1000 towards 0; whole where the scheduler rounds it."""
    return tuple(_GRIDS[scheduler](shift, steps))


def expert_at(time: float, boundary: float | None) -> int:
    """0 for the first transformer, which has the noisy times; 1 for the second, below them."""
    return 0 if boundary is None or time >= boundary * TRAIN_STEPS else 1


def shifted(level: float, shift: float) -> float:
    """A level moved towards the noisy end."""
    return shift * level / (1 + (shift - 1) * level)


def original_grid(steps: int) -> list[float]:
    """The noise levels of the original Wan programs, before the shift: 1, 1 − 1/n, …, 1/n."""
    return [1 - step / steps for step in range(steps)]


def _unipc(shift: float, steps: int) -> Sequence[float]:
    """Even levels from 1 to 1/1000, of which the last is left out; whole times below 1000."""
    levels = (shifted(level, shift) for level in _even(steps)[:-1])
    return [float(min(TRAIN_STEPS - 1, int(level * TRAIN_STEPS))) for level in levels]


def _dpm(shift: float, steps: int) -> Sequence[float]:
    """Even levels from 1 − 1/1000 to 0, of which the last is left out; whole times."""
    levels = (shifted(1 - signal, shift) for signal in reversed(_even(steps)[1:]))
    return [float(int(level * TRAIN_STEPS)) for level in levels]


def _even(steps: int) -> list[float]:
    """From 1 to 1/1000 in so many steps, summed as numpy does: whole times hang on the last bit."""
    return [*(1 + step * ((_LAST - 1) / steps) for step in range(steps)), _LAST]


def _original(shift: float, steps: int) -> Sequence[float]:
    """In float32, as the schedulers: a time may be the boundary's own, and all hangs on a bit."""
    towards, apart = _single(shift), _single(shift - 1)
    times = []
    for level in map(_single, original_grid(steps)):
        below = _single(1 + _single(apart * level))
        times.append(_single(_single(_single(towards * level) / below) * TRAIN_STEPS))
    return times


def _single(number: float) -> float:
    """The nearest float32."""
    return float(*struct.unpack("f", struct.pack("f", number)))


def _flow_euler(shift: float, steps: int) -> Sequence[float]:
    """Even levels from 1 to the least of the shifted training table, shifted again."""
    least, apart = shifted(_LAST, shift), max(1, steps - 1)
    levels = (1 - step / apart * (1 - least) for step in range(steps))
    return [shifted(level, shift) * TRAIN_STEPS for level in levels]


_GRIDS: Mapping[str, Callable[[float, int], Sequence[float]]] = MappingProxyType(
    {
        "unipc": _unipc,
        "euler": _original,
        "dpm++2m": _dpm,
        "lcm": _original,
        "flow-euler": _flow_euler,
    }
)
