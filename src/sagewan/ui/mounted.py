"""A page with gradio's server around it."""

import gradio as gr
from fastapi import FastAPI

from sagewan.ui.page import build_page
from sagewan.ui.quick_gradio import gradio_server, rested, without_servers
from sagewan.ui.templates import static
from sagewan.ui.uploads import MAX_BYTES

_FONTS = ["Inter", "system-ui", "Segoe UI", "Noto Sans CJK SC", "PingFang SC", "sans-serif"]
_FIXED_FONTS = ["ui-monospace", "Cascadia Mono", "Menlo", "monospace"]


def make_page(language: str) -> FastAPI:
    """The page in one language, under its name: ``/en/``."""
    with without_servers():
        page = build_page(language)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        rested(page),
        path=f"/{language}",
        footer_links=[],
        run_history=False,
        max_file_size=MAX_BYTES,
        theme=gr.themes.Base(
            primary_hue="indigo",
            neutral_hue="slate",
            radius_size="lg",
            font=_FONTS,
            font_mono=_FIXED_FONTS,
        ),
        css=static("style.css"),
        show_error=True,
        ssr_mode=False,
        pwa=False,
    )
    page.app = gradio_server(app)
    return app
