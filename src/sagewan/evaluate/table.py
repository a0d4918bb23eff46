"""What the clips of an evaluation say, as JSON, as Markdown and as a chart."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sagewan.evaluate.cells import Cell
from sagewan.evaluate.statistics import mean, paired_difference, share
from sagewan.pipeline.chart import bars

Lines = Sequence[Mapping[str, Any]]


def summary(cells: Sequence[Cell], lines: Lines) -> list[dict[str, Any]]:
    """One entry for each cell, the reference first."""
    reference = cells[0].name
    return [_entry(cell, reference, lines) for cell in cells]


def _entry(cell: Cell, reference: str, lines: Lines) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": cell.name,
        "attention": cell.attention,
        "quantization": cell.quantization,
        "sparsity": cell.sparsity and str(cell.sparsity),
        "cache": cell.cache and str(cell.cache),
        "same_as": cell.same_as,
        "fallbacks": [change.to_json() for change in cell.changes],
    }
    if cell.same_as:
        return entry
    own = [line["cells"][cell.name] for line in lines]
    counts = Counter(told for one in own for told in one["ran"])
    entry["ran"] = dict(counts.most_common())
    entry["clips"] = len(own)
    entry["seconds"] = sum(one["seconds"] for one in own) / len(own)
    if "right" in own[0]:
        entry |= _scores(own, [line["cells"][reference] for line in lines], lines)
    if cell.sparsity:
        entry["skipped"] = mean([one["skipped"] for one in own]).to_json()
    if cell.cache:
        entry["reused"] = mean([one["reused"] for one in own]).to_json()
    if cell.name != reference:
        entry["finite"] = sum(one["finite"] for one in own)
        for name in ("psnr", "ssim", "dit"):
            values = [one[name] for one in own if one[name] is not None]
            entry[name] = mean(values).to_json() if values else None
    return entry


def _scores(own: Lines, reference: Lines, lines: Lines) -> dict[str, Any]:
    hits = [bool(one["right"]["all"]) for one in own]
    others = [bool(one["right"]["all"]) for one in reference]
    names = dict.fromkeys(name for one in own for name in one["right"])
    by_language = {
        language: share(
            [hit for hit, line in zip(hits, lines, strict=True) if line["language"] == language]
        ).to_json()
        for language in dict.fromkeys(line["language"] for line in lines)
    }
    attributes = {
        name: share([one["right"][name] for one in own if name in one["right"]]).to_json()
        for name in names
    }
    found: dict[str, Any] = {
        "right": {"count": sum(hits), **share(hits).to_json()},
        "by_language": by_language,
        "by_attribute": attributes,
    }
    if own is not reference:
        change = paired_difference(hits, others)
        found["change"] = change.to_json() | {
            "gained": sum(a and not b for a, b in zip(hits, others, strict=True)),
            "lost": sum(b and not a for a, b in zip(hits, others, strict=True)),
        }
    return found


# Heading, key, how a value is written.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("PSNR, dB", "psnr", lambda x: f"{x:.2f}"),
    ("SSIM", "ssim", lambda x: f"{x:.4f}"),
    ("DiT error", "dit", lambda x: f"{x:.4f}"),
)


def markdown(entries: Sequence[Mapping[str, Any]], heading: str) -> str:
    """The table, and below it what gave way to what."""
    scored = "right" in entries[0]
    columns = [title for title, *_ in _COLUMNS]
    head = ["asked for", "what ran", *(["all right", "change"] if scored else []), *columns]
    lines = [heading, "", _row(head), _row(["---"] * len(head))]
    lines += [_row(_cells(entry, entries, scored=scored)) for entry in entries]
    notes = [
        f"{entry['name']}: {change['from']} gave way to {change['to']}: {change['why']}"
        for entry in entries
        for change in entry["fallbacks"]
    ]
    notes += [
        f"{entry['name']}: of {entry['clips']} clips only {entry['finite']} were finite"
        for entry in entries
        if entry.get("finite", entry.get("clips")) != entry.get("clips")
    ]
    if notes:
        lines += ["", *(f"- {note}" for note in dict.fromkeys(notes))]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(
    entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], *, scored: bool
) -> list[str]:
    if entry["same_as"]:
        ran = f"the same as {entry['same_as']}"
        return [entry["name"], ran, *["–"] * (len(_COLUMNS) + (2 if scored else 0))]
    cells = [entry["name"], " + ".join([*entry["ran"], *_left_out(entry)])]
    first = entry is entries[0]
    if scored:
        cells.append(f"{entry['right']['count']} of {entry['clips']}")
        cells.append("reference" if first else _bounded(entry["change"], _points))
    for _, key, shown in _COLUMNS:
        value = entry.get(key)
        cells.append("reference" if first else "–" if value is None else _bounded(value, shown))
    return cells


def _left_out(entry: Mapping[str, Any]) -> list[str]:
    """What of attention sparsity left out, and what of the forward passes a step cache, on
    average."""
    told = []
    if entry["sparsity"]:
        told.append(f"{entry['skipped']['value']:.0%} of the blocks of keys left out")
    if entry["cache"]:
        told.append(f"{entry['reused']['value']:.0%} of the passes reused")
    return told


def _points(x: float) -> str:
    """A change of a share, in points of a hundred."""
    return f"{100 * x:+.2f}"


def _bounded(value: Mapping[str, float], shown: Callable[[float], str]) -> str:
    return f"{shown(value['value'])} ({shown(value['low'])} … {shown(value['high'])})"


def chart(entries: Sequence[Mapping[str, Any]]) -> str:
    """SVG: a bar for each cell that ran, with its bounds, in a group for each figure."""
    shown = [entry for entry in entries if not entry["same_as"]]
    keys = [("all right, share", "right")] if "right" in shown[0] else []
    keys += [(title, key) for title, key, _ in _COLUMNS]
    values = {title: [_value(entry.get(key)) for entry in shown] for title, key in keys}
    bounds = {title: [_bounds(entry.get(key)) for entry in shown] for title, key in keys}
    return bars([entry["name"] for entry in shown], values, bounds)


def _value(found: Mapping[str, float] | None) -> float | None:
    return None if found is None else found["value"]


def _bounds(found: Mapping[str, float] | None) -> tuple[float, float] | None:
    return None if found is None else (found["low"], found["high"])
