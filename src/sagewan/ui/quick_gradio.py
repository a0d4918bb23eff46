"""Imports gradio in a third of the time, and makes its pages in half the time.

At each import gradio writes type stubs of its components beside its own sources, which took 1.3 of
2.4 s on two idle cores. Nothing reads them at run time, so that step is left out; where a version
of gradio has no such step, nothing is changed. pandas, which only its tables and statistics use, is
imported when something first touches it (0.11 s); and the garbage collector, which finds no garbage
among 1,250 fresh modules, looks at them once and not at every few hundred objects (0.12 s).
"""

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio.blocks import Blocks
    from gradio.routes import App

_MODULE, _STEP = "gradio.component_meta", "create_or_modify_pyi"
_LATER = "pandas"
# Seconds between two looks of gradio's at its queue: it looks a thousand times a second, which took
# 4 % of a core for nothing.
_REST = 0.01
_ONCE = threading.Lock()


class _WithoutStubs(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if hasattr(module, _STEP):
            setattr(module, _STEP, lambda *_: None)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (_MODULE, _LATER):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            wrap = _WithoutStubs if fullname == _MODULE else importlib.util.LazyLoader
            spec.loader = wrap(spec.loader)
        return spec


def import_gradio() -> None:
    """Call before the first ``import gradio``. It also turns gradio's telemetry off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Statistics of every event over all before, for a dashboard that is off; they take pandas.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(1 << 62)
    with _ONCE:
        if "gradio" in sys.modules:
            return
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        gc.disable()
        try:
            import gradio  # noqa: F401
        finally:
            gc.freeze()
            gc.enable()
            sys.meta_path.remove(finder)


@contextmanager
def without_servers() -> Iterator[None]:
    """While pages are made in here, gradio makes no server for each: it would make two for every
    page, and throw them away for the one by which the page is then mounted, which it must be given
    (:func:`gradio_server`)."""
    from gradio.routes import App

    make = App.__dict__["create_app"]
    App.create_app = staticmethod(lambda *_, **__: None)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        App.create_app = make  # type: ignore[method-assign]


def rested(page: "Blocks") -> "Blocks":
    """The page, whose queue looks for work a hundred times a second."""
    queue = page._queue  # noqa: SLF001
    queue.sleep_when_free = max(queue.sleep_when_free, _REST)
    return page


def gradio_server(app: "FastAPI") -> "App":
    """gradio's server of the page that was mounted last."""
    from gradio.routes import App

    mounted = (getattr(route, "app", None) for route in reversed(app.routes))
    return next(server for server in mounted if isinstance(server, App))
