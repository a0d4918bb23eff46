"""From a row to its function: the one place where an attention package is imported."""

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

from sagewan.plan.objection import Objection
from sagewan.plan.row import Row

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


class ImplementationError(Exception):
    """A row could not be loaded or failed when called; with this evidence, plan again."""

    def __init__(self, row: Row, objection: Objection) -> None:
        super().__init__(f"{row.name}: {objection.sentence()}")
        self.row = row
        self.objection = objection

    @property
    def implementation(self) -> str:
        """The row's name."""
        return self.row.name


def load(row: Row) -> Function:
    """Import the function that a row names. Raises ImplementationError with the reason.

    Packages for a GPU that is absent, or built for another torch, fail in every way at import:
    ImportError, AssertionError, RuntimeError of a driver, even sys.exit. All are objections.

    The UserWarnings that the row knows to mean nothing are silent from then on.
    """
    # Once, and not around each call: warnings.catch_warnings is not for several threads.
    for message in row.quiet:
        warnings.filterwarnings("ignore", message, UserWarning)
    module_name, _, function_name = row.call.partition(":")
    package = row.package or module_name.partition(".")[0]
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:
        logger.debug("importing %s", module_name, exc_info=True)
        values = {"package": package, "error": one_line(error)}
        raise ImplementationError(row, Objection("import-failed", values)) from error
    if not callable(function):
        values = {"package": package, "function": f"{module_name}.{function_name}"}
        raise ImplementationError(row, Objection("function-missing", values))
    return function  # type: ignore[no-any-return]


def name_of(function: Function, row: Row) -> str:
    """The row's name if this is the function it names, by the function's own account.

    A function that was put in its place is reported as what it is: ``module.qualified_name``.
    A package may define it in any of its modules, or in its C extension. Ours does not, and its
    kernels and their emulations share names, so there the module counts as well.
    """
    module_name, _, function_name = row.call.partition(":")
    own_module = getattr(function, "__module__", None) or ""
    own_name = getattr(function, "__qualname__", type(function).__qualname__)
    ours = module_name.startswith("sagewan.")
    home = own_module if ours else own_module.partition(".")[0]
    same_home = home == (module_name if ours else module_name.partition(".")[0])
    if same_home and own_name == function_name:
        return row.name
    return f"{own_module}.{own_name}"


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, short enough for a sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
