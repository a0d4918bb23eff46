"""The command line: flags to requests, results to lines, errors to one sentence and a code."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from sagewan import __version__
from sagewan.cli.streams import flush, give_up_output, never_refuse_a_character, say, warnings_told
from sagewan.errors import Cancelled, RequestError, SagewanError
from sagewan.pipeline.segments import let_segments_grow

# The modules are imported when their command is called: --help must not wait for torch.
COMMANDS = {
    "ui": "open the app in the browser",
    "generate": "make a video from a prompt",
    "compare": "make one video in several settings, side by side",
    "evaluate": "say what each attention mode and quantization costs in quality",
    "plan": "say what would run, and what it needs; loads nothing",
    "inspect": "say what a checkpoint is, and what is wrong with it",
    "models": "list the models on this machine",
    "download": "fetch a published model: resumed, checked, never without being asked",
    "doctor": "say what this machine can run, and try it",
    "queue": "show and change the videos that wait, or make them",
    "calibrate": "measure a model once, for --cache mag or for quantising it",
    "quantize": "write a model's transformer as FP8 or FP4 files",
    "bench": "measure attention or a whole step here, ours and others', on the same inputs",
    "jobs": "list, show and cancel runs",
}


class _Help(argparse.HelpFormatter):
    """Argparse's, with room for the longest command: it forgets that commands are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, 4 + max(map(len, COMMANDS)))


class Parser(argparse.ArgumentParser):
    """Argparse whose complaint is a RequestError like any other: one sentence."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A SagewanError is one sentence on stderr, what nobody
    foresaw keeps its traceback."""
    never_refuse_a_character()
    # Before any command uses a GPU.
    let_segments_grow()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            flush()
    except KeyboardInterrupt:
        return _fail(Cancelled("cancelled"))
    except SagewanError as error:
        return _fail(error)
    except BrokenPipeError:
        return give_up_output()


def _fail(error: SagewanError) -> int:
    say(str(error))
    return error.exit_code


def _run(argv: list[str]) -> int:
    parser = Parser(
        prog="sagewan",
        description="Wan video generation in the attention precision you choose, "
        "and a report of what ran.",
        epilog="exit codes: 0 done, 1 unexpected, 2 the request is wrong, 3 this machine can't do "
        "it (under --strict, or out of memory), 4 the result was rejected, 130 cancelled",
        allow_abbrev=False,
        formatter_class=_Help,
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
    if not argv:
        parser.print_help()
        return RequestError.exit_code
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _unknown(unknown, chosen)
    with warnings_told():
        return int(arguments.run(arguments))


def _unknown(words: Sequence[str], command: str | None) -> RequestError:
    """The refusal of words that no flag takes; most often a prompt that lacks its quotes."""
    hint = f"see sagewan {command} --help"
    if command in ("generate", "compare", "plan") and not words[0].startswith("-"):
        hint = 'put the prompt in quotes, such as "a red ball"'
    return RequestError(f"unrecognized arguments: {' '.join(words)}; {hint}")
