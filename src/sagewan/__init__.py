"""Wan video generation in the attention precision you choose, and a report of what ran.

>>> import sagewan
>>> sagewan.generate(sagewan.Request(prompt="a red ball rolls to the right"))  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagewan.pipeline import generate
    from sagewan.pipeline.attach import attach
    from sagewan.pipeline.attend import attend
    from sagewan.pipeline.session import Session
    from sagewan.plan.request import Request

__version__ = "0.1.0.dev0"
__all__ = ["Request", "Session", "__version__", "attach", "attend", "generate"]

# Named lazily, so that the command line answers --help without importing torch.
_HOMES = {
    "attach": "sagewan.pipeline.attach",
    "attend": "sagewan.pipeline.attend",
    "generate": "sagewan.pipeline",
    "Request": "sagewan.plan.request",
    "Session": "sagewan.pipeline.session",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sagewan' has no attribute {name!r}")
    from sagewan.pipeline.segments import let_segments_grow

    # Before what is named uses a GPU.
    let_segments_grow()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
