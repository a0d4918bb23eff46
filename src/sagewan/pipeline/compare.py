"""One prompt and seed in several settings: the videos, side by side, and what each cost.

PSNR and SSIM are of the delivered files, H.264 and all, against those of the first setting.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan.errors import RequestError
from sagewan.pipeline.chart import bars
from sagewan.pipeline.export import read_frames, write_video
from sagewan.pipeline.files import check_outputs, written_whole
from sagewan.pipeline.metrics import Likeness, likeness
from sagewan.pipeline.progress import Watch
from sagewan.pipeline.run import Result, execute, prepare, with_seed
from sagewan.pipeline.tiles import Wall
from sagewan.plan.hardware import GIB
from sagewan.plan.modes import AUTO
from sagewan.plan.parse import NONE_IS_AUTO, OFF
from sagewan.plan.request import Request
from sagewan.plan.serialize import fields_from_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sagewan.pipeline.loaded import Loaded

MOST = 4
# What a comparison keeps the same, or decides itself.
_FIXED = ("prompt", "seed", "output", "report")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the settings that are compared: what it changes, in words, and the whole request."""

    name: str
    request: Request


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One video of a comparison; ``likeness`` to the first, None for the first itself and where
    the sizes or lengths differ."""

    name: str
    result: Result
    likeness: Likeness | None

    def to_json(self) -> dict[str, Any]:
        report = self.result.report
        steps = report["timings"]["steps"]
        return {
            "name": self.name,
            "path": str(self.result.path),
            "modes": [row["mode"] for row in report["attention"]["ran"]],
            "emulated": report["attention"]["emulated"],
            "fallbacks": report["attention"]["fallbacks"],
            "seconds": report["timings"]["total"],
            "seconds_per_step": sum(steps) / len(steps) if steps else None,
            "peak_device_bytes": report["memory"]["peak_device_bytes"],
            "likeness": self.likeness and self.likeness.to_json(),
            "report": report,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything of a comparison; the files lie beside ``side_by_side``."""

    videos: tuple[Compared, ...]
    side_by_side: Path
    difference: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "videos": [video.to_json() for video in self.videos],
            "side_by_side": str(self.side_by_side),
            "difference": str(self.difference),
        }

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| setting | ran | PSNR, dB | SSIM | seconds | s/step | peak memory, GiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (video.to_json() for video in self.videos):
            ran = " + ".join(dict.fromkeys(row["modes"]))
            cells = [row["name"], ran + " (emulated)" * row["emulated"], *_numbers(row)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def variants_of(request: Request, changes: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """The requests of a comparison: ``request`` with each of the changes (fields as JSON), writing
    to files beside its output. The seed is drawn here if none is given.

    Raises RequestError unless two to four different settings are compared.
    """
    if not 2 <= len(changes) <= MOST:
        raise RequestError(f"compare takes 2 to {MOST} settings, and {len(changes)} were given")
    request = with_seed(replace(request, report=None))
    variants = []
    for number, change in enumerate(changes, start=1):
        if fixed := [name for name in change if name in _FIXED]:
            raise RequestError(f"compare keeps {fixed[0]} the same for all settings; leave it out")
        output = request.output.with_name(f"{request.output.stem}-{number}.mp4")
        # What is null takes its default, whatever the base has.
        unset = {name: getattr(Request, name) for name, value in change.items() if value is None}
        fields = fields_from_json(change) | unset
        name = " ".join(f"{key}={_shown(key, value)}" for key, value in change.items())
        name = name or "as it is"
        variants.append(Variant(name=name, request=replace(request, output=output, **fields)))
    if len({variant.name for variant in variants}) < len(variants):
        raise RequestError("compare was given one setting twice: make them different")
    return variants


def compare(
    variants: Sequence[Variant], *, watch: Watch, loaded: "Loaded | None" = None
) -> Comparison:
    """Make every video, then the files that compare them: NAME.mp4 with all side by side,
    NAME-difference.mp4, NAME.md, NAME.json and NAME.svg, where the videos are NAME-1.mp4, ….

    All requests are checked before the first is run. Raises as ``generate``.
    """
    output = variants[0].request.output
    output = output.with_name(f"{output.stem.removesuffix('-1')}.mp4")
    check_outputs(replace(variants[0].request, output=output))
    prepared = []
    for variant in variants:
        watch.check()
        prepared.append(prepare(variant.request, watch, loaded=loaded))
    results = []
    for number, (variant, ready) in enumerate(zip(variants, prepared, strict=True), start=1):
        part = watch.for_part(f"{number}/{len(variants)} {variant.name}")
        results.append(execute(ready, part, loaded=loaded))
    watch.stage("compare")
    comparison = Comparison(
        videos=tuple(_compared(variants, results)),
        side_by_side=output,
        difference=output.with_name(f"{output.stem}-difference.mp4"),
    )
    _write(comparison)
    return comparison


def _compared(variants: Sequence[Variant], results: Sequence[Result]) -> Iterator[Compared]:
    first = results[0]
    for variant, result in zip(variants, results, strict=True):
        alike = None
        if result is not first and _shape(result) == _shape(first):
            alike = likeness(read_frames(first.path), read_frames(result.path))
        yield Compared(name=variant.name, result=result, likeness=alike)


def _shape(result: Result) -> tuple[object, ...]:
    output = result.report["output"]
    return (*output["size"], output["frames"])


def _write(comparison: Comparison) -> None:
    videos = comparison.videos
    fps = videos[0].result.report["output"]["fps"]
    wall = Wall([video.name for video in videos])
    with written_whole(comparison.side_by_side) as partial:
        write_video(partial, wall.frames(_frames(videos)), fps=fps)
    with written_whole(comparison.difference) as partial:
        write_video(partial, wall.differences(_frames(videos)), fps=fps)
    texts = {
        ".md": comparison.table(),
        ".json": json.dumps(comparison.to_json(), indent=2) + "\n",
        ".svg": _chart(comparison),
    }
    for suffix, text in texts.items():
        with written_whole(comparison.side_by_side.with_suffix(suffix)) as partial:
            partial.write_text(text, encoding="utf-8")


def _frames(videos: Sequence[Compared]) -> "list[Iterator[NDArray[np.uint8]]]":
    return [read_frames(video.result.path) for video in videos]


def _chart(comparison: Comparison) -> str:
    rows = [video.to_json() for video in comparison.videos]
    names = [row["name"] for row in rows]
    return bars(
        names,
        {
            "seconds": [row["seconds"] for row in rows],
            "PSNR, dB": [(row["likeness"] or {}).get("psnr") for row in rows],
            "peak memory, GiB": [_gib(row["peak_device_bytes"]) for row in rows],
        },
    )


def _numbers(row: Mapping[str, Any]) -> list[str]:
    alike = row["likeness"]
    if alike is None:
        quality = ["–", "–"]
    else:
        quality = ["equal" if alike["equal"] else f"{alike['psnr']:.1f}", f"{alike['ssim']:.4f}"]
    step = row["seconds_per_step"]
    peak = _gib(row["peak_device_bytes"])
    return [
        *quality,
        f"{row['seconds']:.1f}",
        "–" if step is None else f"{step:.2f}",
        "–" if peak is None else f"{peak:.2f}",
    ]


def _gib(count: int | None) -> float | None:
    return None if count is None else count / GIB


def _shown(field: str, value: object) -> str:
    """A value as its flag takes it."""
    if value is None:
        return AUTO if field in NONE_IS_AUTO else OFF
    if not isinstance(value, list):
        return str(value)
    numbers = all(isinstance(item, int) for item in value)
    return ("x" if numbers and len(value) == 2 else ",").join(map(str, value))
