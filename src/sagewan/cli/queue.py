"""``sagewan queue``: the videos that wait, in the order they will run; the app's queue too."""

import argparse
import contextlib
import json
import os
import secrets
import signal
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from sagewan.cli.flags import add_request_flags, request_from
from sagewan.cli.jobs import when
from sagewan.errors import RequestError, StateError

if TYPE_CHECKING:
    from sagewan.jobs.queue import Queue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list (the default), add, move, repeat, cancel, remove, work."""
    parser.add_argument("--json", action="store_true", help="list for scripts")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="what runs and waits, in its order (also without ACTION)")
    add = actions.add_parser("add", help="put a video into the queue; flags as of generate")
    add_request_flags(add)
    move = actions.add_parser("move", help="change the order")
    move.add_argument("id", type=int)
    move.add_argument("where", choices=("first", "up", "down", "last"))
    repeat = actions.add_parser("repeat", help="the same again with another seed")
    repeat.add_argument("id", type=int)
    repeat.add_argument("--seed", type=int, help="this one (default: drawn)")
    cancel = actions.add_parser("cancel", help="take it out, or stop it if it runs")
    cancel.add_argument("id", type=int)
    remove = actions.add_parser("remove", help="forget it, and delete its video")
    remove.add_argument("id", type=int)
    work = actions.add_parser("work", help="make the videos of the queue; the app starts this")
    work.add_argument("--until-empty", action="store_true", help="end when none is left")
    work.add_argument(
        "--while-stdin", action="store_true", help="end when standard input does; for a parent"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show or change the queue, or work on it."""
    from sagewan.jobs.queue import Queue
    from sagewan.jobs.records import default_path

    if arguments.action == "work":
        return _work(until_empty=arguments.until_empty, while_stdin=arguments.while_stdin)
    try:
        with Queue(default_path()) as queue:
            text = _ACTIONS[arguments.action or "list"](queue, arguments)
    except StateError as error:
        raise RequestError(str(error)) from None
    except (OSError, sqlite3.Error) as error:
        raise _unusable(error) from error
    print(text)
    return 0


def _unusable(error: Exception) -> RequestError:
    from sagewan.jobs.records import default_path

    return RequestError(
        f"the queue in {default_path()} can't be used ({error}); set SAGEWAN_DATA to a folder "
        "that can be written"
    )


def _list(queue: "Queue", arguments: argparse.Namespace) -> str:
    from sagewan.jobs.states import State

    jobs = [*queue.of(None, State.RUNNING), *queue.waiting()]
    if arguments.json:
        return json.dumps([asdict(job) for job in jobs], indent=2)
    lines = (
        f"{job.id:5}  {when(job.created)}  {job.state:<7}  {job.owner}  {job.request['prompt']}"
        for job in jobs
    )
    return "\n".join(lines) or "the queue is empty"


def _add(queue: "Queue", arguments: argparse.Namespace) -> str:
    from sagewan.jobs.outputs import for_queue
    from sagewan.jobs.queue import COMMAND_LINE
    from sagewan.pipeline.draft import draft_plan
    from sagewan.pipeline.probe import probe
    from sagewan.pipeline.run import with_seed

    request = with_seed(request_from(arguments))
    # Refused now, not when its turn comes.
    draft_plan(request, probe())
    name = request.output.stem if "output" in vars(arguments) else None
    queued = for_queue(request, name)
    job = queue.enqueue(queued, COMMAND_LINE)
    return _queued(job, queued.seed, queued.output)


def _move(queue: "Queue", arguments: argparse.Namespace) -> str:
    queue.move(arguments.id, arguments.where)
    return _list(queue, arguments)


def _repeat(queue: "Queue", arguments: argparse.Namespace) -> str:
    from sagewan.jobs.outputs import repeat
    from sagewan.jobs.queue import COMMAND_LINE

    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    found = queue.owned(arguments.id, None)
    job = repeat(queue, found, seed, found.owner or COMMAND_LINE)
    return _queued(job, seed, queue.job(job).request["output"])


def _queued(job: int, seed: int | None, output: object) -> str:
    return f"job {job}: seed {seed}, becomes {output}; sagewan queue work, or the app, makes it"


def _cancel(queue: "Queue", arguments: argparse.Namespace) -> str:
    queue.owned(arguments.id, None)
    return f"job {arguments.id}: {queue.cancel(arguments.id)}"


def _remove(queue: "Queue", arguments: argparse.Namespace) -> str:
    from sagewan.jobs.outputs import forget

    forget(queue, arguments.id)
    return f"job {arguments.id}: removed"


_ACTIONS = {
    "list": _list,
    "add": _add,
    "move": _move,
    "repeat": _repeat,
    "cancel": _cancel,
    "remove": _remove,
}


def _work(*, until_empty: bool, while_stdin: bool) -> int:
    from sagewan.cli.show import shown
    from sagewan.jobs.records import default_path
    from sagewan.jobs.worker import work
    from sagewan.pipeline.progress import Watch

    stop = threading.Event()
    if while_stdin:
        threading.Thread(target=_stop_with_stdin, args=(stop,), daemon=True).start()
    with _stopped_by_signals(stop), contextlib.ExitStack() as stack:

        def watch_of() -> Watch:
            stack.close()  # The line of the job before.
            watch = Watch()
            stack.enter_context(shown(watch))
            return watch

        try:
            work(default_path(), stop, until_empty=until_empty, watch_of=watch_of)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(error) from error
    return 0


def _stop_with_stdin(stop: threading.Event) -> None:
    # Not by sys.stdin, which a thread that waits in it keeps from being closed: Python would abort
    # if the work ended first.
    while os.read(0, 1024):
        pass
    stop.set()


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the work at the next block; the job under way goes back."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
