"""Segments of a GPU's memory that can grow: torch's allocator has them, but not unless asked.

A segment that is taken as it is can't be used for a larger tensor, and the VAE's are of many sizes:
where segments grow, decoding goes in a fifth less (docs/measured.md).
"""

import os
import platform
import sys

# Where torch reads what its allocator is to do, the older name last; it does so when a GPU is first
# used (2.11).
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROWING = "expandable_segments:True"


def let_segments_grow() -> bool:
    """Ask torch for segments that can grow, if it has not begun to use a GPU; whether they do.
    Whoever has set torch's allocator already is not overruled."""
    said = next((os.environ[name] for name in _SETTINGS if name in os.environ), None)
    if said is None and not _begun() and _have_them():
        os.environ[_SETTINGS[0]] = said = _GROWING
    asked = _GROWING.lower() in (said or "").replace(" ", "").lower()
    # Elsewhere torch says that it has none, and goes on without.
    return asked and platform.system() == "Linux"


def _begun() -> bool:
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda is not None and cuda.is_initialized()


def _have_them() -> bool:
    # torch has none on Windows. Under WSL drivers before R615 refuse them on some cards:
    # https://github.com/pytorch/pytorch/issues/192330
    return platform.system() == "Linux" and "microsoft" not in platform.release().lower()
