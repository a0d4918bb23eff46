"""What is answered while the pages are still being made, and what comes of it."""

import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sagewan.ui import assets
from sagewan.ui.front import OURS, Front, Make, Site

HTML = "<!doctype html><html lang='en'><head><title>a page</title></head></html>"


async def whole(_: Request) -> HTMLResponse:
    return HTMLResponse(HTML)


async def ours(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ours")


def language_page() -> Starlette:
    return Starlette(routes=[Route("/zh/", whole)])


def own() -> Starlette:
    return Starlette(routes=[Route("/fragment", ours)])


@contextmanager
def visitor(own: Make = own, page: Make = language_page, **site: object) -> Iterator[TestClient]:
    front = Front(Site(**site), {OURS: own, "zh": page})  # type: ignore[arg-type]
    with TestClient(front.app, base_url="http://localhost", follow_redirects=False) as opened:
        yield opened


def test_scripts_and_the_way_to_the_page_are_there_before_anything_is_made() -> None:
    made = threading.Event()

    def late() -> Starlette:
        assert made.wait(30)
        return own()

    try:
        with visitor(late) as client:
            assert client.get("/", headers={"accept-language": "zh"}).headers["location"] == "/zh/"
            name = next(name for name in assets.wanted_first() if name.endswith(".js"))
            script = client.get(f"/zh/assets/{name}")
            assert script.content == (assets.folder() / name).read_bytes()
            assert "immutable" in script.headers["cache-control"]
            assert not made.is_set()
            made.set()
            assert client.get("/fragment").text == "ours"
    finally:
        made.set()


def test_a_page_has_our_head_and_the_rest_of_gradios() -> None:
    with visitor() as client:
        html = client.get("/zh/").text
    assert html.endswith("<title>a page</title></head></html>")
    assert html.startswith('<!doctype html><html lang="zh"')
    assert html.count("<head>") == html.count("<html") == 1
    assert "'zh-CN'" in html
    assert set(re.findall(r'href="assets/([^"]+)"', html)) == set(assets.wanted_first())


def test_the_scripts_of_this_gradio_are_understood() -> None:
    names = assets.wanted_first()
    assert len(names) == len(set(names)) > 50
    assert sum(name.startswith("Blocks-") for name in names) == 2
    assert sum((assets.folder() / name).stat().st_size for name in names) < 1_200_000


@pytest.mark.parametrize("page", [None, "", "src='./assets/index-a1.js'", "assets/index-a1.css"])
def test_a_gradio_of_another_make_is_served_without_hints(
    page: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if page is not None:
        (tmp_path / "index.html").write_text(page)
    monkeypatch.setattr(assets, "folder", lambda: tmp_path / "assets")
    monkeypatch.setattr(assets, "names", assets.names.__wrapped__)
    assert assets.names() == frozenset()
    assert assets.wanted_first.__wrapped__() == ()


@pytest.mark.parametrize("name", ["../index.html", "%2e%2e/index.html", "nothing.js", "."])
def test_only_gradios_own_files_are_given(name: str) -> None:
    with visitor() as client:
        assert client.get(f"/zh/assets/{name}").status_code == 404


def test_over_a_network_gradio_packs_its_scripts_itself() -> None:
    name = assets.wanted_first()[0]
    with visitor(loopback=False) as client:
        assert client.get(f"/zh/assets/{name}").status_code == 404


def test_the_password_is_asked_for_before_anything_is_made() -> None:
    with visitor(login=("me", "secret")) as client:
        for path in ("/", "/zh/", f"/zh/assets/{assets.wanted_first()[0]}", "/fragment"):
            assert client.get(path).status_code == 401, path


def test_what_cannot_be_made_ends_the_server_with_its_reason() -> None:
    def broken() -> Starlette:
        raise OSError("gradio is damaged")

    front, ended = Front(Site(), {OURS: broken}), threading.Event()
    front.failed = ended.set
    with TestClient(front.app, base_url="http://localhost") as client:
        assert ended.wait(30)
        with pytest.raises(OSError, match="damaged"):
            client.get("/fragment")
    assert isinstance(front.error, OSError)


def test_what_cannot_be_opened_ends_the_server_with_its_reason() -> None:
    @asynccontextmanager
    async def broken(_: Starlette) -> AsyncIterator[None]:
        raise OSError("no queue")
        yield

    front, ended = Front(Site(), {OURS: lambda: Starlette(lifespan=broken)}), threading.Event()
    front.failed = ended.set
    with TestClient(front.app, base_url="http://localhost") as client:
        assert ended.wait(5)
        with pytest.raises(OSError, match="queue"):
            client.get("/fragment")


def test_a_part_is_made_once_and_closed_at_the_end() -> None:
    log: list[str] = []

    def counted() -> Starlette:
        @asynccontextmanager
        async def held(_: Starlette) -> AsyncIterator[None]:
            log.append("open")
            yield
            log.append("closed")

        return Starlette(routes=[Route("/zh/", whole)], lifespan=held)

    with visitor(page=counted) as client:
        assert log == []
        assert client.get("/zh/").status_code == client.get("/zh/").status_code == 200
        assert log == ["open"]
    assert log == ["open", "closed"]
