"""Jobs and plans as the pages show them: plain values for the templates, in one language."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagewan.jobs.queue import Queue
from sagewan.jobs.records import Job, JobEvent
from sagewan.jobs.states import State
from sagewan.plan.hardware import GIB
from sagewan.ui.words import Words

ENDED = (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A running job's last event. ``share`` of the stage is 0 to 1, None if it is not counted."""

    stage: str
    part: str | None
    done: int
    total: int | None
    share: float | None
    pace: str | None
    left: str | None
    memory: str | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A job as it is shown. ``settings`` are the facts under its prompt; ``notes`` the fallbacks
    and whatever else differs from what was asked; ``place`` its place in the whole queue, from 1.
    """

    id: int
    state: str
    prompt: str
    settings: tuple[str, ...]
    ran: str | None
    notes: tuple[str, ...]
    error: str | None
    log: str
    took: str | None
    place: int | None
    progress: Progress | None
    preview: int | None
    compares: bool
    video: bool


def cards(queue: Queue, owner: str, words: Words, *, limit: int = 60) -> list[Card]:
    """An owner's jobs: what runs, what waits in its order, what has ended from the newest."""
    waiting = queue.waiting()
    order = {job.id: place for place, job in enumerate(waiting, start=1)}
    jobs = [
        *queue.of(owner, State.RUNNING),
        *(job for job in waiting if job.owner == owner),
        *queue.of(owner, *ENDED, limit=limit),
    ]
    return [card(queue, job, words, order.get(job.id)) for job in jobs]


def current(queue: Queue, owner: str, words: Words) -> Card | None:
    """The video that the first page shows: what runs, else what waits, else what ended last.
    Comparisons have a page of their own."""
    running = queue.of(owner, State.RUNNING, limit=1, compares=False)
    if running:
        return card(queue, running[0], words)
    for place, job in enumerate(queue.waiting(), start=1):
        if job.owner == owner and job.variants is None:
            return card(queue, job, words, place)
    ended = queue.of(owner, *ENDED, limit=1, compares=False)
    return card(queue, ended[0], words) if ended else None


def card(queue: Queue, job: Job, words: Words, place: int | None = None) -> Card:
    running = job.state is State.RUNNING
    seen = queue.preview(job.id) if running else None
    report = job.report or {}
    took = job.finished - job.started if job.started and job.finished else None
    return Card(
        id=job.id,
        state=job.state.value,
        prompt=str(job.request.get("prompt", "")),
        settings=tuple(_settings(job, words)),
        ran=ran(report, words),
        notes=tuple(_notes(job, words)),
        error=job.error and words.sentence(job.error),
        log=job.log,
        took=None if took is None else words.seconds(took),
        place=place,
        progress=_progress(queue.events(job.id), words) if running else None,
        preview=seen[0] if seen else None,
        compares=job.variants is not None,
        video=job.state is State.DONE and job.variants is None,
    )


def ran(report: Mapping[str, Any], words: Words) -> str | None:
    """The modes that ran, as the report has them."""
    rows = report.get("attention", {}).get("ran", [])
    modes = dict.fromkeys(row["mode"] for row in rows)
    if not modes:
        return None
    emulated = words("job.emulated") if report["attention"].get("emulated") else ""
    return " + ".join(modes) + emulated


def _settings(job: Job, words: Words) -> list[str]:
    plan, request = job.plan or {}, job.request
    facts = [str(plan.get("model", {}).get("name") or request.get("model", ""))]
    if size := plan.get("size") or request.get("size"):
        facts.append(f"{size[0]}×{size[1]}")
    if frames := plan.get("frames") or request.get("frames"):
        facts.append(words("job.frames", count=frames))
    steps = plan.get("steps", {}).get("count") or request.get("steps")
    if steps:
        facts.append(words("job.steps", count=steps))
    if request.get("seed") is not None:
        facts.append(words("job.seed", seed=request["seed"]))
    return facts


def _notes(job: Job, words: Words) -> list[str]:
    report, plan = job.report or {}, job.plan or {}
    steps = report.get("attention", {}).get("fallbacks")
    if steps is None:
        steps = plan.get("attention", {}).get("fallbacks", [])
    return [
        *fallback_notes(steps, words),
        *fallback_notes(report.get("blocks", {}).get("fallbacks", []), words),
        *left_out(report, words),
        *(words.sentence(note) for note in plan.get("notes", [])),
        *(words.sentence(note) for note in report.get("memory", {}).get("notes", [])),
    ]


def left_out(report: Mapping[str, Any], words: Words) -> Iterator[str]:
    """What sparsity and a step cache left out."""
    if sparsity := report.get("attention", {}).get("sparsity"):
        share = f"{sparsity['skipped']:.0%}"
        yield words("job.skipped", sparsity=sparsity["requested"], share=share)
    if cache := report.get("cache"):
        counts = {"reused": cache["reused"], "forwards": cache["forwards"]}
        yield words("job.reused", cache=cache["requested"], **counts)


def fallback_notes(steps: Iterable[Mapping[str, Any]], words: Words) -> list[str]:
    """Steps down as a report has them, each chain with one reason in one sentence."""
    chains: list[list[str]] = []
    for step in steps:
        if chains and chains[-1][1:] == [step["from"], step["why"]]:
            chains[-1][1] = step["to"]
        else:
            chains.append([step["from"], step["to"], step["why"]])
    return [
        words("job.fallback", source=source, target=target, why=words.sentence(why))
        for source, target, why in chains
    ]


def _progress(events: Sequence[JobEvent], words: Words) -> Progress | None:
    if not events:
        return None
    last = events[-1]
    since = time.time() - last.at
    left = None if last.seconds_left is None else max(last.seconds_left - since, 0.0)
    return Progress(
        stage=words.stage(last.stage),
        part=last.part,
        done=last.done,
        total=last.total,
        share=last.done / last.total if last.total else None,
        pace=words.seconds(last.seconds / last.done) if last.done and last.total else None,
        left=None if left is None else words.seconds(left),
        memory=None if last.memory is None else f"{last.memory / GIB:.1f} GiB",
    )
