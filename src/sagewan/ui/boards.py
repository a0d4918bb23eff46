"""The parts of the page that refresh themselves, as HTML."""

from collections.abc import Callable, Mapping
from typing import Any

from sagewan.jobs.queue import Queue
from sagewan.plan.hardware import GIB
from sagewan.plan.models import DEMO, PUBLISHED
from sagewan.ui.downloads import DOWNLOADS
from sagewan.ui.found import model_facts
from sagewan.ui.templates import render
from sagewan.ui.views import card, cards, current, fallback_notes, ran
from sagewan.ui.words import Words

_HEADS = ("name", "ran", "psnr", "ssim", "seconds", "step", "memory")


def _live(queue: Queue, owner: str, words: Words) -> str:
    return render("live", words, card=current(queue, owner, words))


def _library(queue: Queue, owner: str, words: Words) -> str:
    return render("library", words, cards=cards(queue, owner, words))


def _compare(queue: Queue, owner: str, words: Words) -> str:
    """The visitor's latest comparison."""
    job = next(iter(queue.of(owner, limit=1, compares=True)), None)
    videos: list[Mapping[str, Any]] = []
    if job and job.report:
        videos = job.report["videos"]
    return render(
        "compare",
        words,
        card=job and card(queue, job, words),
        videos=videos,
        heads=[words(f"compare.head.{head}") for head in _HEADS],
        rows=[_row(video, words) for video in videos],
        notes=list(_notes(videos, words)),
    )


def _model(queue: Queue, owner: str, words: Words) -> str:
    """What is known of the model that the visitor has chosen: what its files are, or that they
    are not here."""
    name = str(queue.draft(owner).get("model") or DEMO)
    facts, problems = model_facts(name)
    return render(
        "model",
        words,
        name=name,
        summary=" · ".join(words.sentence(fact) for fact in facts),
        problems=[words.sentence(text) for text in problems],
        download=DOWNLOADS.get(name),
        allowed=DOWNLOADS.allowed and name in PUBLISHED,
    )


BOARDS: Mapping[str, Callable[[Queue, str, Words], str]] = {
    "live": _live,
    "library": _library,
    "compare": _compare,
    "model": _model,
}


def _row(video: Mapping[str, Any], words: Words) -> list[str]:
    alike, peak = video["likeness"], video["peak_device_bytes"]
    quality = ["–", "–"]
    if alike:
        psnr = words("compare.equal") if alike["equal"] else f"{alike['psnr']:.1f}"
        quality = [psnr, f"{alike['ssim']:.4f}"]
    step = video["seconds_per_step"]
    return [
        video["name"],
        ran(video["report"], words) or "–",
        *quality,
        f"{video['seconds']:.1f}",
        "–" if step is None else f"{step:.2f}",
        "–" if peak is None else f"{peak / GIB:.2f}",
    ]


def _notes(videos: list[Mapping[str, Any]], words: Words) -> dict[str, None]:
    """Each fallback, once."""
    steps = [fallback_notes(video["fallbacks"], words) for video in videos]
    return dict.fromkeys(note for notes in steps for note in notes)
