"""Serves the pages, the videos and the parts that refresh themselves; the worker is a process of
its own (``sagewan queue work``), so that nothing it does can take the page down."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import gradio as gr
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from sagewan.errors import RequestError
from sagewan.jobs.outputs import file_name, outputs_folder
from sagewan.jobs.queue import Queue
from sagewan.jobs.records import Job, default_path
from sagewan.jobs.states import State
from sagewan.ui.boards import BOARDS
from sagewan.ui.door import Door, owner_of
from sagewan.ui.downloads import DOWNLOADS
from sagewan.ui.page import build_page, static
from sagewan.ui.quick_gradio import gradio_server, without_servers
from sagewan.ui.uploads import MAX_BYTES
from sagewan.ui.words import LANGUAGES, Words, language_of

_LANGUAGE_COOKIE = "sagewan_language"
_YEAR = 365 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Site:
    """How the app is served. ``login`` is (name, password); ``loopback``: to this machine only."""

    login: tuple[str, str] | None = None
    loopback: bool = True


def make_app(site: Site) -> FastAPI:
    """The whole application, for uvicorn."""
    # Where anyone may come in, nobody may fill the disk.
    DOWNLOADS.allowed = site.loopback or site.login is not None
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/")(_home)
    app.get("/favicon.ico")(_icon)
    app.get("/language/{language}")(_choose_language)
    app.get("/fragment/{language}/{kind}")(_fragment)
    app.get("/preview/{job}")(_preview)
    app.get("/video/{job}")(_video)
    app.get("/video/{job}/{part}")(_video)
    app.middleware("http")(_known_languages)
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["Inter", "system-ui", "Segoe UI", "Noto Sans CJK SC", "PingFang SC", "sans-serif"],
        font_mono=["ui-monospace", "Cascadia Mono", "Menlo", "monospace"],
    )
    for language in LANGUAGES:
        with without_servers():
            page = build_page(language)
        gr.mount_gradio_app(
            app,
            page,
            path=f"/{language}",
            footer_links=[],
            run_history=False,
            max_file_size=MAX_BYTES,
            theme=theme,
            css=static("style.css"),
            show_error=True,
            ssr_mode=False,
            pwa=False,
        )
        page.app = gradio_server(app)
    app.add_middleware(Door, login=site.login, loopback=site.loopback)
    return app


def _head(language: str) -> str:
    """gradio's own words follow the browser; on a page that was chosen, they follow the page."""
    code = {"en": "en-US", "zh": "zh-CN"}[language]
    return (
        f"<script>for(const[k,v]of Object.entries({{language:'{code}',languages:['{code}']}}))"
        "Object.defineProperty(navigator,k,{get:()=>v});</script>"
    )


async def _known_languages(
    request: Request, go_on: Callable[[Request], Awaitable[Response]]
) -> Response:
    """/en → /en/, so that gradio's relative addresses are right; and the page's language is told
    to gradio."""
    language = request.url.path.strip("/")
    if language not in LANGUAGES:
        return await go_on(request)
    if not request.url.path.endswith("/"):
        return RedirectResponse(f"{request.url.path}/")
    answer = await go_on(request)
    # Behind a middleware every answer comes in parts.
    parts = getattr(answer, "body_iterator", None)
    if parts is None or answer.status_code != HTTPStatus.OK:
        return answer
    body = b"".join([_bytes(part) async for part in parts]).decode()
    # First of all in the head: gradio's own script asks for the language as soon as it runs.
    html = body.replace('lang="en"', f'lang="{language}"', 1)
    html = html.replace("<head>", f"<head>{_head(language)}", 1)
    kept = {name: value for name, value in answer.headers.items() if name != "content-length"}
    return Response(html, headers=kept)


def _bytes(part: str | bytes | memoryview) -> bytes:
    return part.encode() if isinstance(part, str) else bytes(part)


def _home(request: Request) -> Response:
    chosen = request.cookies.get(_LANGUAGE_COOKIE)
    if chosen not in LANGUAGES:
        chosen = language_of(request.headers.get("accept-language", ""))
    return RedirectResponse(f"/{chosen}/")


def _icon() -> Response:
    return Response(static("icon.svg"), media_type="image/svg+xml")


def _choose_language(language: str) -> Response:
    if language not in LANGUAGES:
        return Response(status_code=404)
    answer = RedirectResponse(f"/{language}/")
    answer.set_cookie(_LANGUAGE_COOKIE, language, max_age=_YEAR, samesite="lax")
    return answer


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
