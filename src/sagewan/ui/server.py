"""Serves the videos and the parts of the pages that refresh themselves; the worker is a process of
its own (``sagewan queue work``), so that nothing it does can take the page down."""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse

from sagewan.errors import RequestError
from sagewan.jobs.outputs import file_name, outputs_folder
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import Job, default_path
from sagewan.jobs.states import State
from sagewan.ui.boards import BOARDS
from sagewan.ui.door import owner_of
from sagewan.ui.templates import static
from sagewan.ui.words import LANGUAGES, Words


def make_app() -> FastAPI:
    """What is served beside gradio's pages."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/favicon.ico")(_icon)
    app.get("/fragment/{language}/{kind}")(_fragment)
    app.get("/preview/{job}")(_preview)
    app.get("/video/{job}")(_video)
    app.get("/video/{job}/{part}")(_video)
    return app


def _icon() -> Response:
    return Response(static("icon.svg"), media_type="image/svg+xml")


def _fragment(language: str, kind: str, request: Request) -> Response:
    if language not in LANGUAGES or kind not in BOARDS:
        return Response(status_code=404)
    with Queue(default_path()) as queue:
        html = BOARDS[kind](queue, owner_of(request.headers), Words(language))
    tag = f'"{hashlib.sha256(html.encode()).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": "no-store"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return HTMLResponse(html, headers=headers)


def _preview(job: int, request: Request) -> Response:
    with Queue(default_path()) as queue:
        try:
            seen = queue.preview(job, owner_of(request.headers))
        except RequestError:
            seen = None
    if seen is None:
        return Response(status_code=404)
    return Response(seen[1], media_type="image/webp", headers={"cache-control": "private"})


def _video(job: int, request: Request, part: int = 0) -> Response:
    """A finished video of the visitor's own, by its number: never by a path."""
    with Queue(default_path()) as queue:
        try:
            found = queue.owned(job, owner_of(request.headers))
        except RequestError:
            return Response(status_code=404)
    path = _file_of(found, part)
    if path is None:
        return Response(status_code=404)
    headers = {"cache-control": "private, max-age=3600"}
    name = f"{file_name(path.stem)}.mp4" if "download" in request.query_params else None
    return FileResponse(path, media_type="video/mp4", filename=name, headers=headers)


def _file_of(job: Job, part: int) -> Path | None:
    """The video of a job, or one of a comparison's, from 1; None unless it lies in the outputs
    folder."""
    report = job.report or {}
    if job.state is not State.DONE:
        return None
    if job.variants is None:
        text = report["output"]["path"] if part == 0 else None
    elif part == 0:
        text = report["side_by_side"]
    else:
        videos = report["videos"]
        text = videos[part - 1]["path"] if 0 < part <= len(videos) else None
    if text is None:
        return None
    path = Path(text).resolve()
    inside = path.is_relative_to(outputs_folder().resolve())
    return path if inside and path.is_file() else None
