"""What happens when something on the page is touched: each calls what the command line calls."""

import asyncio
import json
import secrets
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from sagewan.checkpoint.find import find_model
from sagewan.errors import RequestError, SagewanError, StateError
from sagewan.jobs.outputs import for_queue, forget, repeat
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import default_path
from sagewan.pipeline.draft import draft_plan
from sagewan.pipeline.probe import probe
from sagewan.pipeline.run import with_seed
from sagewan.plan.request import Request
from sagewan.plan.serialize import field_types
from sagewan.ui.diagnosis import diagnosis_view
from sagewan.ui.door import owner_of
from sagewan.ui.downloads import DOWNLOADS
from sagewan.ui.form import Values, names, request_of, values_of
from sagewan.ui.planned import modes_here, plan_view, quantizations_here
from sagewan.ui.templates import render
from sagewan.ui.widgets import placeholders
from sagewan.ui.words import Words

SLOTS = 4


def refusals(error: SagewanError | None, words: Words) -> str:
    """The field that an error is about and its sentence, as JSON for the page."""
    if error is None:
        return "{}"
    text = str(error)
    field = next(
        (name for name in sorted(field_types(), key=len, reverse=True) if _about(text, name)), ""
    )
    return json.dumps({"field": field, "text": words.sentence(text)}, ensure_ascii=False)


def _about(text: str, field: str) -> bool:
    return text.startswith(tuple(field + mark for mark in ("=", ":", " ")))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """HTML of the plan, of its line under the button, of the modes and of the quantizations (None:
    as it was); the refusal as JSON; and what the empty widgets show."""

    plan: str
    brief: str
    refusal: str
    modes: str | None = None
    weights: str | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)


class Handlers:
    """The events of one page, in its language."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def opened(self, request: gr.Request) -> dict[str, Any]:
        """What stood in the widgets when this visitor was last here."""
        with Queue(default_path()) as queue:
            draft = queue.draft(owner_of(request.headers))
        return {name: value for name, value in draft.items() if name in names()}

    def changed(self, values: Values, request: gr.Request) -> "Answer":
        """What follows from what stands in the widgets now, which is kept for this visitor."""
        words, hardware = self.words, probe()
        with Queue(default_path()) as queue:
            queue.set_draft(owner_of(request.headers), values)
        try:
            wanted = request_of(values, any_prompt=True)
            hints = placeholders(find_model(wanted.model, need_files=False).sampling)
            modes = render("modes", words, modes=modes_here(wanted, hardware, words))
            weights = quantizations_here(wanted, hardware, words)
            view = plan_view(draft_plan(wanted, hardware), words)
        except SagewanError as error:
            text = words.sentence(str(error))
            plan = render("plan", words, plan=None, error=text)
            return Answer(plan=plan, brief="", refusal=refusals(error, words))
        return Answer(
            plan=render("plan", words, plan=view, error=None),
            brief=render("brief", words, plan=view),
            refusal=refusals(None, words),
            modes=modes,
            weights=render("modes", words, modes=weights),
            hints=hints,
        )

    def generate(self, values: Values, request: gr.Request) -> str:
        """Into the queue, or the refusal."""
        return self._enqueue(values, request, None)

    def compare(self, values: Values, slots: list[Mapping[str, Any]], request: gr.Request) -> str:
        """The same for a comparison of the settings in the slots."""
        return self._enqueue(values, request, [slot for slot in slots if slot])

    def _enqueue(
        self, values: Values, request: gr.Request, variants: list[Mapping[str, Any]] | None
    ) -> str:
        from sagewan.pipeline.compare import variants_of

        try:
            wanted = with_seed(request_of(values))
            tried = [wanted]
            if variants is not None:
                tried = [variant.request for variant in variants_of(wanted, variants)]
            for one in tried:
                draft_plan(one, probe())
                find_model(one.model)
            name = str(values.get("output") or "") or None
            with Queue(default_path()) as queue:
                queue.enqueue(for_queue(wanted, name), owner_of(request.headers), variants)
        except SagewanError as refused:
            return refusals(refused, self.words)
        # A number of its own, so that the page sees that it is another answer.
        told = {"queued": self.words("queued.one"), "number": secrets.token_hex(4)}
        return json.dumps(told, ensure_ascii=False)

    def act(self, event: Mapping[str, Any], request: gr.Request) -> dict[str, Any]:
        """A button of a job: cancel, move, repeat, delete; ``use`` gives the job's settings."""
        owner, kind = owner_of(request.headers), event.get("act")
        if kind == "download":
            return self._download(str(event.get("job")))
        with Queue(default_path()) as queue:
            try:
                job = queue.owned(int(event["job"]), owner)
                if kind == "cancel":
                    queue.cancel(job.id)
                elif kind == "move" and event.get("where") in ("up", "down"):
                    queue.move(job.id, str(event["where"]), owner)
                elif kind == "repeat":
                    repeat(queue, job, secrets.randbelow(2**32), owner)
                elif kind == "delete":
                    forget(queue, job.id, owner)
                elif kind == "use":
                    return values_of(job.to_request())
            except StateError:
                pass  # It went on in the meantime, which the page is about to show.
            except (KeyError, ValueError, RequestError, sqlite3.Error) as error:
                gr.Warning(self.words.sentence(str(error)))
        return {}

    def _download(self, name: str) -> dict[str, Any]:
        try:
            DOWNLOADS.start(name)
        except RequestError as error:
            gr.Warning(self.words.sentence(str(error)))
        return {}

    def of_file(self, path: str | None) -> dict[str, Any]:
        """The settings inside a video that the visitor gave; its frames are not looked at."""
        from sagewan.pipeline.export import read_settings
        from sagewan.plan.serialize import settings_from_json

        if not path:
            return {}
        try:
            return values_of(Request(**settings_from_json(read_settings(Path(path)))))
        except (SagewanError, TypeError) as error:
            text = str(error).replace(path, Path(path).name)
            gr.Warning(self.words.sentence(text) or self.words("error.no_video"))
            return {}

    async def diagnose(self) -> str:
        """``sagewan doctor`` in a process of its own: it imports what may crash."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sagewan", "doctor", "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        if process.returncode != 0:
            last = err.decode(errors="replace").strip().rpartition("\n")[2]
            text = self.words("doctor.failed", error=last)
            return render("plan", self.words, plan=None, error=text)
        view = diagnosis_view(json.loads(out), self.words)
        return render("doctor", self.words, **view)
