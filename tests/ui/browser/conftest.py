"""A real server, a real worker, a real browser."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sagewan.jobs.queue import Queue

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
PATIENCE = 120_000

Page = Any
Open = Callable[..., Page]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and CHROMIUM is None:
            item.add_marker(pytest.mark.skip(reason="no chromium here: apt-get install chromium"))


@dataclass
class Server:
    """A running ``sagewan ui``; ``cpu`` is what it took to its first page, in seconds."""

    process: subprocess.Popen[str]
    url: str
    data: Path
    cpu: float

    def queue(self) -> Queue:
        return Queue(self.data / "jobs.sqlite")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        if self.process.stdout:
            self.process.stdout.close()


def environment_of(data: Path) -> dict[str, str]:
    """What a server with folders of its own is started with."""
    return {
        **os.environ,
        "SAGEWAN_DATA": str(data),
        "SAGEWAN_CACHE": str(data / "cache"),
        "SAGEWAN_MODELS": str(data / "models"),
        "OMP_NUM_THREADS": "1",
    }


def started(data: Path, *flags: str, login: tuple[str, ...] | None = None) -> Server:
    """Start a server with folders of its own; it has answered once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sagewan", "ui", "--no-browser", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=environment_of(data),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    url = next(word for word in line.split() if word.startswith("http"))
    auth = httpx.BasicAuth(*login) if login else None
    assert "gradio_config" in httpx.get(url + "en/", auth=auth, timeout=60).text
    times = psutil.Process(process.pid).cpu_times()
    return Server(process, url, data, times.user + times.system)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = started(tmp_path_factory.mktemp("app"))
    yield running
    running.stop()


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Closed before other tests of this process run: while it is open, an event loop runs in their
    thread, which refuses another and confuses Python 3.11's parser."""
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Open]:
    """Open the page as a new visitor; what the page complains of fails the test."""
    contexts = []
    complaints: list[str] = []

    def open_page(url: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"locale": "en-US", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url or server.url)
        page.wait_for_selector("#field-prompt textarea")
        page.wait_for_selector("#sw-brief .sw-chip", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def write(page: Page, name: str, text: str) -> None:
    page.fill(f"#field-{name} textarea, #field-{name} input", text)


def ask(page: Page, prompt: str, **settings: object) -> None:
    """A small video: seconds, not minutes."""
    values = {"frames": 5, "steps": 2, "seed": 1, **settings}
    for name, value in values.items():
        write(page, name, str(value))
    choose(page, "size", "64x64")
    write(page, "prompt", prompt)


def choose(page: Page, name: str, text: str) -> None:
    """Type into a list and take what it offers."""
    box = page.locator(f"#field-{name} input")
    box.fill(text)
    box.press("Enter")


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


@contextmanager
def patiently(seconds: float = 60) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds

    def until(true: Callable[[], bool]) -> None:
        while not true():
            assert time.monotonic() < end, "it took too long"
            time.sleep(0.1)

    yield until
