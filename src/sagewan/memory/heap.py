"""Host memory that was freed goes back to the system.

glibc keeps what is freed in pieces of up to 32 MiB for later, which is most matrices of an 8-bit
model: gigabytes that nothing uses, and that no larger piece can be made of.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back_heap() -> None:
    """Return what the C library keeps of freed memory, where it is glibc; elsewhere nothing."""
    trim = _trim()
    if trim:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    # musl has no such function, and gives large pieces back at once.
    with contextlib.suppress(OSError, AttributeError):
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return found
    return None
