"""The pictures of the app in the docs, made from a real run on the demo model, light and dark.

    python tools/screenshots.py docs/images

Needs Chromium and playwright (``make browser``), and a Chinese font (Debian: fonts-noto-cjk).
"""

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.ui.browser.conftest import CHROMIUM, FLAGS, choose, started, tab, write

WIDE = {"width": 1280, "height": 860}
NARROW = {"width": 390, "height": 844}
# Text stays sharp, and a picture takes some 50 KB.
QUALITY = 82


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as data, sync_playwright() as playwright:
        server = started(Path(data))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            context = browser.new_context(viewport=WIDE, locale="en-US")
            page = context.new_page()
            page.set_default_timeout(300_000)
            page.goto(server.url)
            take(page, folder)
        finally:
            browser.close()
            server.stop()


def take(page: Page, folder: Path) -> None:
    """Go through the app once, with a picture at each place."""

    def shot(name: str, **options: Any) -> None:
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(700)
        save(page.screenshot(**options), folder / f"app-{name}.webp")

    page.wait_for_selector("#sw-brief .sw-chip")
    write(page, "prompt", "a red ball rolls to the right")
    write(page, "seed", "1")
    page.wait_for_timeout(800)
    page.click("#sw-go")
    page.wait_for_function(
        "parseInt(document.querySelector('#sw-live .sw-count')?.textContent) > 3"
    )
    shot("running")
    page.wait_for_selector("#sw-live video")
    in_dark(page, lambda: shot("done-dark"))
    tab(page, "Model Settings")
    choose(page, "attention", "sageattn_3_fp4")
    page.wait_for_selector("#sw-plan >> text=gave way to")
    shot("settings", full_page=True)
    page.click("#field-emulate input")
    tab(page, "Compare")
    page.wait_for_timeout(500)
    page.click("#sw-compare-go")
    page.wait_for_selector("#sw-compare .sw-videos")
    page.wait_for_timeout(1500)
    shot("compare", full_page=True)
    in_chinese(page, shot)


def in_chinese(page: Page, shot: Callable[..., None]) -> None:
    """The same in Chinese, and small."""
    page.click("text=中文")
    page.wait_for_selector("#sw-brief .sw-chip", state="attached")
    page.wait_for_timeout(1200)
    shot("zh")
    tab(page, "模型设置")
    in_dark(page, lambda: shot("settings-zh-dark", full_page=True))
    tab(page, "队列与作品")
    page.wait_for_selector("#sw-library .sw-card")
    shot("gallery-zh")
    page.set_viewport_size(NARROW)
    tab(page, "生成")
    shot("small-zh")


def in_dark(page: Page, action: Callable[[], None]) -> None:
    page.emulate_media(color_scheme="dark")
    page.evaluate("document.body.classList.add('dark')")
    action()
    page.emulate_media(color_scheme="light")
    page.evaluate("document.body.classList.remove('dark')")


def save(png: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").save(path, "WEBP", quality=QUALITY, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
