"""Bar charts as SVG, written by hand: a few rectangles need no library."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT, _HEAD = 720, 18, 8, 260, 90, 34
COLOURS = ("#4f46e5", "#0d9488", "#d97706", "#db2777")
_OF_OTHERS = "#9ca3af"


Bounds = tuple[float, float] | None


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    bounds: Mapping[str, Sequence[Bounds]] | None = None,
    marked: Collection[str] | None = None,
) -> str:
    """One group of horizontal bars for each series, a bar for each name; None has no bar. Each
    group begins at zero and ends at its own largest value. ``bounds``, of the same series, are
    drawn as a line from the lower to the upper one. The ``marked`` names have a colour and the
    others none; without, each name has another."""
    colours = [_colour(row, name, marked) for row, name in enumerate(names)]
    group = _HEAD + len(names) * (_BAR + _GAP)
    height = group * len(series) + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif" '
        f'font-size="13"><title>{escape(", ".join(series))}</title>'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
    )
    parts = [head]
    for index, (title, values) in enumerate(series.items()):
        drawn = (bounds or {}).get(title, [None] * len(values))
        rows = list(zip(names, colours, values, drawn, strict=True))
        parts += _group(title, rows, index * group)
    return "\n".join((*parts, "</svg>")) + "\n"


def _colour(row: int, name: str, marked: Collection[str] | None) -> str:
    if marked is None:
        return COLOURS[row % len(COLOURS)]
    return COLOURS[0] if name in marked else _OF_OTHERS


def _group(
    title: str, rows: Sequence[tuple[str, str, float | None, Bounds]], top: int
) -> Iterator[str]:
    ends = [max(value, drawn[1] if drawn else value) for *_, value, drawn in rows if value]
    most = max(ends, default=0.0)
    yield f'<text x="{_GAP}" y="{top + 24}" font-weight="600">{escape(title)}</text>'
    for row, (name, colour, value, drawn) in enumerate(rows):
        y = top + _HEAD + row * (_BAR + _GAP)
        scale = (_WIDTH - _LEFT - _RIGHT) / most if most else 0.0
        low, high = ((_LEFT + scale * end) for end in drawn or (0, 0))
        length = scale * (value or 0)
        end = max(_LEFT + length, high if drawn else 0)
        shown = "–" if value is None else f"{value:.3g}"
        yield (
            f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="3" '
            f'fill="{colour}"/>'
            f'<text x="{end + 6:.1f}" y="{y + 14}">{shown}</text>'
        )
        if drawn:
            middle = y + _BAR // 2
            yield f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#111827" stroke-width="2"/>'
