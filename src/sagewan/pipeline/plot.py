"""Lines and points on two logarithmic axes as SVG, as :mod:`sagewan.pipeline.chart` its bars."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from sagewan.pipeline.chart import COLOURS

Point = tuple[float, float]

_PALETTE = (*COLOURS, "#65a30d", "#0284c7", "#9333ea", "#78716c")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 420, 64, 16, 34, 46


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (x, y), both positive; joined by a line where ``line`` is set, dashed where
    ``dashed`` is; ``marks`` draws a dot at each. Series with the same colour number belong
    together; None is grey."""

    name: str
    points: tuple[Point, ...]
    colour: int | None = None
    line: bool = True
    dashed: bool = False
    marks: bool = True


@dataclass(frozen=True)
class _Scale:
    """From the decade that holds the least to the largest value, drawn from ``start`` to ``end``
    pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> "_Scale":
        return cls(math.log10(min(values) / 1.15), math.log10(max(values) * 1.15), start, end)

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """1, 2 and 5 of each power of ten within."""
        for power in range(math.floor(self.low), math.ceil(self.high) + 1):
            for step in (1, 2, 5):
                if self.low <= math.log10(step) + power <= self.high:
                    yield step * 10.0**power


def plot(title: str, series: Sequence[Series], x: str, y: str) -> str:
    """A chart of these series, with what the axes say."""
    every = [point for one in series for point in one.points]
    across = _Scale.of([a for a, _ in every], _LEFT, _WIDTH - _RIGHT)
    up = _Scale.of([b for _, b in every], _HEIGHT - _BOTTOM, _TOP)
    height = _HEIGHT + 20 * math.ceil(len(series) / 2) + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif" '
        f'font-size="12"><title>{escape(title)}</title>'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="8" y="20" font-size="13" font-weight="600">{escape(title)}</text>'
    )
    parts = [head, *_axes(across, up, x, y)]
    for one in series:
        parts += _drawn(one, across, up)
    parts += _legend(series)
    return "\n".join((*parts, "</svg>")) + "\n"


def _axes(across: _Scale, up: _Scale, x: str, y: str) -> Iterator[str]:
    for value in across.ticks():
        at = across.at(value)
        yield f'<path d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#e5e7eb"/>'
        yield (
            f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{_short(value)}</text>"
        )
    for value in up.ticks():
        at = up.at(value)
        yield f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#e5e7eb"/>'
        yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x)}</text>'
    yield (
        f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}</text>"
    )


def _drawn(one: Series, across: _Scale, up: _Scale) -> Iterator[str]:
    places = [(across.at(a), up.at(b)) for a, b in one.points]
    colour = _colour(one)
    if one.line:
        way = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        yield f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>'
    if one.marks:
        for (a, b), (value, other) in zip(places, one.points, strict=True):
            yield (
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}">'
                f"<title>{escape(one.name)}: {value:.4g}, {other:.4g}</title></circle>"
            )


def _legend(series: Sequence[Series]) -> Iterator[str]:
    for index, one in enumerate(series):
        x, y = _LEFT + (index % 2) * 330, _HEIGHT + 12 + 20 * (index // 2)
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        if one.marks:
            yield f'<circle cx="{x + 10}" cy="{y - 4}" r="4" fill="{_colour(one)}"/>'
        if one.line:
            yield (
                f'<path d="M{x} {y - 4}h20" stroke="{_colour(one)}" stroke-width="1.6"{dashes}/>'
            )
        yield f'<text x="{x + 28}" y="{y}">{escape(one.name)}</text>'


def _colour(one: Series) -> str:
    return "#6b7280" if one.colour is None else _PALETTE[one.colour % len(_PALETTE)]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
