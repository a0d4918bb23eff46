"""Every error the product raises on purpose; the command line turns each into one sentence.

::

    SagewanError            exit 1   base; never raised itself
    ├── RequestError        exit 2   the request is wrong; the message says the fix
    │   ├── ShapeError      exit 2   tensors that attention does not take
    │   ├── CheckpointError exit 2   model files that are missing, broken or not Wan
    │   └── StateError      exit 2   a job that is not in the state for it
    ├── UnsupportedError    exit 3   this machine can't do it: ``strict`` forbids a substitute, or
    │                                memory ran out
    ├── RejectedError       exit 4   the result was not finite, black or constant
    └── Cancelled           exit 130 stopped by the user

Anything else keeps its traceback and exits 1.
"""


class SagewanError(Exception):
    """Base of the errors that carry one sentence for the user."""

    exit_code = 1


class RequestError(SagewanError, ValueError):
    """The request is wrong; the message names the value and the fix."""

    exit_code = 2


class ShapeError(RequestError):
    """Tensors whose shape, dtype or device an attention call does not take."""


class CheckpointError(RequestError):
    """Model files that are missing, broken, or not of a Wan model."""


class StateError(RequestError):
    """A job was told to go to a state that does not follow from the one it is in."""


class UnsupportedError(SagewanError):
    """This machine can't run what was asked for: a substitute was forbidden, or memory ran out."""

    exit_code = 3


class RejectedError(SagewanError):
    """The result was not finite, black or constant, and was not saved as a success."""

    exit_code = 4


class Cancelled(SagewanError):
    """The user stopped the work; nothing partial was left behind."""

    exit_code = 130
