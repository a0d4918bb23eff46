"""Answers visitors from the first moment, while gradio is still being imported behind it.

A page is sent in two parts: at once its head, by which the browser fetches gradio's scripts and
styles (:mod:`sagewan.ui.assets`), and gradio's own page as soon as it is made. So the server's
start and the browser's go on side by side. A language's page is made when it is first asked for.
"""

import asyncio
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from sagewan.ui import assets
from sagewan.ui.door import Door
from sagewan.ui.words import LANGUAGES, language_of

_LANGUAGE_COOKIE = "sagewan_language"
_YEAR = 365 * 24 * 3600
# The name of such a file changes with what is in it.
_KEPT = {"cache-control": f"public, max-age={_YEAR}, immutable"}
# The part behind the front that is no language's page.
OURS = ""

Make = Callable[[], Starlette]


@dataclass(frozen=True, kw_only=True)
class Site:
    """How the app is served. ``login`` is (name, password); ``loopback``: to this machine only."""

    login: tuple[str, str] | None = None
    loopback: bool = True


class Front:
    """``parts`` makes what is behind: :data:`OURS`, which is made at once, and a page for each
    language. If nothing can be served, ``error`` says why and ``failed`` is called."""

    def __init__(self, site: Site, parts: Mapping[str, Make]) -> None:
        self._parts = parts
        self.failed: Callable[[], None] = lambda: None
        self._opened: dict[str, asyncio.Future[Starlette]] = {}
        self._holders: list[asyncio.Task[None]] = []
        self._closing = asyncio.Event()
        # One at a time: gradio's pages can't be built side by side.
        self._workshop = ThreadPoolExecutor(1, thread_name_prefix="opening")
        self.error: BaseException | None = None
        # Over a network gradio itself serves them, which packs them first.
        served = [Route("/{language}/assets/{name}", _asset)] if site.loopback else []
        self.app = Starlette(
            routes=[
                Route("/", _home),
                Route("/language/{language}", _choose_language),
                *(Route(f"/{name}", _with_slash) for name in LANGUAGES),
                *(Route(f"/{name}/", self._page) for name in LANGUAGES),
                *served,
                Mount("/", self._rest),
            ],
            middleware=[Middleware(Door, login=site.login, loopback=site.loopback)],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._part(OURS)
        yield
        self._closing.set()
        self._workshop.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*self._holders, return_exceptions=True)

    def _part(self, name: str) -> Awaitable[Starlette]:
        if name not in self._opened:
            self._opened[name] = asyncio.get_running_loop().create_future()
            self._holders.append(asyncio.create_task(self._hold(name)))
        # Of several visitors who wait for it, one may go away.
        return asyncio.shield(self._opened[name])

    async def _hold(self, name: str) -> None:
        """Make a part, and keep it open until the end."""
        opened = self._opened[name]
        loop = asyncio.get_running_loop()
        try:
            app = await loop.run_in_executor(self._workshop, self._parts[name])
            async with app.router.lifespan_context(app):
                opened.set_result(app)
                await self._closing.wait()
        except Exception as error:  # It is raised again where it is waited for.
            if opened.done():
                raise
            opened.set_exception(error)
            if name == OURS:
                self.error = opened.exception()
                self.failed()

    async def _rest(self, scope: Scope, receive: Receive, send: Send) -> None:
        """gradio's, under a language's name, and what else is ours."""
        name = scope["path"].split("/")[1]
        app = await self._part(name if name in LANGUAGES else OURS)
        await app(scope, receive, send)

    async def _page(self, request: Request) -> Response:
        return StreamingResponse(self._sent(request), media_type="text/html")

    async def _sent(self, request: Request) -> AsyncIterator[str]:
        language = request.url.path.strip("/")
        yield _head(language)
        html = await _answer(await self._part(language), request)
        yield html.partition("<head>")[2]


async def _answer(app: Starlette, request: Request) -> str:
    """What an application answers to a request, whole."""
    parts: list[bytes] = []

    async def take(message: Message) -> None:
        parts.append(message.get("body", b""))

    await app(request.scope, request.receive, take)
    return b"".join(parts).decode()


def _head(language: str) -> str:
    """The beginning of a page in place of gradio's. gradio's own words follow the browser's
    language; on a page that was chosen, they follow the page: its script asks as soon as it runs.
    """
    code = {"en": "en-US", "zh": "zh-CN"}[language]
    style = "margin:0;padding:0;min-height:100%;display:flex;flex-direction:column"
    script = (
        f"for(const[k,v]of Object.entries({{language:'{code}',languages:['{code}']}}))"
        "Object.defineProperty(navigator,k,{get:()=>v});"
    )
    early = "".join(_early(name) for name in assets.wanted_first())
    return (
        f'<!doctype html><html lang="{language}" style="{style}"><head><meta charset="utf-8">'
        f"<script>{script}</script>{early}"
    )


def _early(name: str) -> str:
    if name.endswith(".js"):
        return f'<link rel="modulepreload" href="assets/{name}">'
    return f'<link rel="preload" as="style" crossorigin href="assets/{name}">'


async def _home(request: Request) -> Response:
    chosen = request.cookies.get(_LANGUAGE_COOKIE)
    if chosen not in LANGUAGES:
        chosen = language_of(request.headers.get("accept-language", ""))
    return RedirectResponse(f"/{chosen}/")


async def _with_slash(request: Request) -> Response:
    """gradio's addresses are relative to its page's."""
    return RedirectResponse(f"{request.url.path}/")


async def _choose_language(request: Request) -> Response:
    language = request.path_params["language"]
    if language not in LANGUAGES:
        return Response(status_code=404)
    answer = RedirectResponse(f"/{language}/")
    answer.set_cookie(_LANGUAGE_COOKIE, language, max_age=_YEAR, samesite="lax")
    return answer


async def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in assets.names():
        return Response(status_code=404)
    # Small, and in the system's memory: a thread for it would take longer.
    kind = mimetypes.guess_type(name)[0]
    return Response((assets.folder() / name).read_bytes(), media_type=kind, headers=_KEPT)
