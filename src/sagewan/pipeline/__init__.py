"""From a request to a video: the stages in order, each in a file of its own."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagewan.pipeline.run import Result, generate

__all__ = ["Result", "generate"]


# Named lazily, so that whoever needs one stage does not load the others.
def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'sagewan.pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module("sagewan.pipeline.run"), name)
