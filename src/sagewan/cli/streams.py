"""Standard output and error: in any encoding, and with readers that go away."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator

# What Python itself exits with when a reader has gone; 0 would call a cut text whole.
CLOSED = 1


def never_refuse_a_character() -> None:
    """Characters that the stream's encoding lacks become "?": redirected output on Windows has the
    code page of the system, and a file name need not be valid Unicode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors="replace")


def flush() -> None:
    """Write out what is buffered now, not when the interpreter ends, where nobody catches the
    BrokenPipeError."""
    if sys.stdout is not None:
        sys.stdout.flush()


def give_up_output() -> int:
    """The reader of the output has gone, as ``| head`` does: discard the rest; the exit code."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
    return CLOSED


class _Warnings(logging.Handler):
    """Looks stderr up at each line, which a progress bar redirects."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """This package's warnings are lines on stderr while the block runs."""
    logger = logging.getLogger("sagewan")
    logger.setLevel(logging.INFO)
    handler = _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def say(text: str) -> None:
    """One line on stderr. Nobody may be reading: that is no reason to end an hour's run."""
    with contextlib.suppress(BrokenPipeError):
        print(f"sagewan: {text}", file=sys.stderr)
