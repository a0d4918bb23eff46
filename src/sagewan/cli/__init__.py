"""The command line: flags to requests, results to lines, errors to one sentence and a code."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from sagewan import __version__
from sagewan.errors import Cancelled, RequestError, SagewanError

# The modules are imported when their command is called: --help must not wait for torch.
COMMANDS = {
    "generate": "make a video from a prompt",
    "plan": "say what would run, and what it needs; loads nothing",
    "doctor": "say what this machine can run, and try it",
    "jobs": "list, show and cancel runs",
}


class Parser(argparse.ArgumentParser):
    """Argparse whose complaint is a RequestError like any other: one sentence."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A SagewanError is one sentence on stderr, what nobody
    foresaw keeps its traceback."""
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        return _fail(Cancelled("cancelled"))
    except SagewanError as error:
        return _fail(error)


def _fail(error: SagewanError) -> int:
    print(f"sagewan: {error}", file=sys.stderr)
    return error.exit_code


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="sagewan",
        description="Wan video generation in the attention precision you choose, "
        "and a report of what ran.",
        epilog="exit codes: 0 done, 1 unexpected, 2 the request is wrong, 3 this machine can't do "
        "it under --strict, 4 the result was rejected, 130 cancelled",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sagewan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(f"sagewan.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    logging.getLogger("sagewan").setLevel(logging.INFO)
    return int(arguments.run(arguments))
