"""Seconds a step against tokens, beside a model: attention quadratic, and all else linear."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sagewan.bench.contestants import Setting, contestants
from sagewan.bench.step import measure
from sagewan.plan.request import NO_QUANTIZATION

TOKENS = (8_000, 16_000, 32_000, 64_000, 125_000, 250_000)
TOKENS_ON_CPU = (96, 192, 384)
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One contestant's seconds a step at so many tokens; ``linear`` and ``quadratic`` are the
    seconds a token and a pair of tokens that fit best, ``worst`` the largest share by which a
    figure departs from them."""

    name: str
    points: tuple[tuple[int, float], ...]
    linear: float
    quadratic: float
    worst: float


def grow(
    setting: Setting,
    tokens: Sequence[int],
    quantization: str,
    modes: Sequence[str],
    *,
    rounds: int = ROUNDS,
    told: Callable[[str], None] = lambda _: None,
) -> list[Growth]:
    """diffusers, ours with nothing quantised, and ours quantised so with the last of these modes
    that runs here, each at all of these lengths."""
    points: dict[str, list[tuple[int, float]]] = {}
    for count in tokens:
        at = replace(setting, case=setting.case.long(count))
        told(f"{at.case.tokens:,} tokens")
        stored = tuple(dict.fromkeys((NO_QUANTIZATION, quantization)))
        chosen, _ = contestants(at, (), stored, tuple(dict.fromkeys(("sdpa", *modes))))
        # The baseline, the first of ours, and the last.
        racing = [chosen[0], chosen[1], *chosen[2:][-1:]]
        for found in measure(at, racing, rounds=rounds, profiled=False):
            if found.step_seconds is not None:
                points.setdefault(found.name, []).append((at.case.tokens, found.step_seconds))
    return [fitted(name, found) for name, found in points.items()]


def fitted(name: str, points: Sequence[tuple[int, float]]) -> Growth:
    """The least squares of the *shares* by which seconds = linear·tokens + quadratic·tokens²
    departs from the points, so that short lengths count as long ones do; neither is negative."""
    rows = [(tokens / seconds, tokens**2 / seconds) for tokens, seconds in points]
    aa, bb = sum(a * a for a, _ in rows), sum(b * b for _, b in rows)
    ab = sum(a * b for a, b in rows)
    a, b = sum(a for a, _ in rows), sum(b for _, b in rows)
    determinant = aa * bb - ab * ab
    linear, quadratic = a / aa, 0.0
    if len({tokens for tokens, _ in points}) > 1 and b * aa > a * ab:
        linear, quadratic = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if linear < 0:
        linear, quadratic = 0.0, b / bb
    worst = max(abs(linear * x + quadratic * y - 1) for x, y in rows)
    return Growth(name=name, points=tuple(points), linear=linear, quadratic=quadratic, worst=worst)
