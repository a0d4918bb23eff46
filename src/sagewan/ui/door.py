"""What every visit passes first: which host it means, who it is, and what the answer may load."""

import base64
import binascii
import re
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "sagewan"
# Set here from the cookie or the password; whatever the visitor sent under this name is dropped.
OWNER = "x-sagewan-owner"
_TOKEN = re.compile(r"[0-9a-f]{32}")
_YEAR = 365 * 24 * 3600
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Everything comes from this server; gradio's page has scripts and styles inside it.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; font-src 'self' data:; frame-ancestors 'self'; form-action 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


class Door:
    """ASGI middleware. ``login`` is (name, password), None for no password; with ``loopback`` only
    names of this machine are answered, so that no page elsewhere can reach it by a name of its
    own."""

    def __init__(
        self, app: ASGIApp, *, login: tuple[str, str] | None = None, loopback: bool = True
    ) -> None:
        self._app = app
        self._login = login
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        owner, new = self._owner(headers)
        kept = [(name, value) for name, value in scope["headers"] if name != OWNER.encode()]
        scope = {**scope, "headers": [*kept, (OWNER.encode(), owner.encode())]}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                _complete(message, new)
            await send(message)

        await self._app(scope, receive, answer)

    def _refusal(self, headers: Headers) -> PlainTextResponse | None:
        if self._loopback and _host(headers.get("host", "")) not in LOOPBACK:
            return PlainTextResponse("this server answers to localhost only", 421)
        if self._login and not _matches(headers.get("authorization", ""), self._login):
            return PlainTextResponse(
                "a name and a password are needed",
                401,
                {"www-authenticate": 'Basic realm="sagewan", charset="UTF-8"'},
            )
        return None

    def _owner(self, headers: Headers) -> tuple[str, str | None]:
        """Who it is, and the token of a new cookie if there was none."""
        token = _cookie(headers.get("cookie", ""))
        if token:
            return token, None
        token = secrets.token_hex(16)
        return token, token


def _complete(message: Message, new: str | None) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    if new:
        # Lax: a link to this page from elsewhere brings the cookie along, a form there does not.
        headers.append(
            "set-cookie", f"{COOKIE}={new}; Max-Age={_YEAR}; Path=/; HttpOnly; SameSite=Lax"
        )


def _host(header: str) -> str:
    """``localhost:7860`` → ``localhost``, ``[::1]:7860`` → ``::1``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _matches(header: str, login: tuple[str, str]) -> bool:
    kind, _, text = header.partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        given = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    # In constant time, so that the password can't be guessed letter by letter.
    return secrets.compare_digest(given, ":".join(login).encode())


def _cookie(header: str) -> str | None:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel and _TOKEN.fullmatch(morsel.value) else None


def owner_of(headers: Mapping[str, Any]) -> str:
    """Whose visit a request is, by the header that the door has set."""
    return str(headers[OWNER])
