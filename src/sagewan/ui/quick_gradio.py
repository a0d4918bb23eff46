"""Imports gradio in half the time, and makes its pages in half the time.

At each import gradio writes type stubs of its components beside its own sources, which took 1.3 of
2.4 s on two idle cores. Nothing reads them at run time, so that step is left out; where a version
of gradio has no such step, nothing is changed.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio.routes import App

_MODULE, _STEP = "gradio.component_meta", "create_or_modify_pyi"


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
        if fullname != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _WithoutStubs(spec.loader)
        return spec


def import_gradio() -> None:
    """Call before the first ``import gradio``. It also turns gradio's telemetry off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import gradio  # noqa: F401
    finally:
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


def gradio_server(app: "FastAPI") -> "App":
    """gradio's server of the page that was mounted last."""
    from gradio.routes import App

    mounted = (getattr(route, "app", None) for route in reversed(app.routes))
    return next(server for server in mounted if isinstance(server, App))
