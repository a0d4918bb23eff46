"""Runs one self-test in a process of its own: ``python -m sagewan.attention.worker``.

A row, a device and a problem go in as JSON on standard input; the result is one marked line of
standard output, since packages print what they like around it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from sagewan.plan.catalogue import Implementation, Problem
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Device
from sagewan.plan.objection import Objection

_MARK = "sagewan-self-test "


def in_own_process(
    row: Implementation,
    device: Device,
    problem: Problem,
    *,
    failed: Callable[[Objection], SelfTest],
    timeout: float,
) -> SelfTest:
    """The self-test of a row, from another process; its death is told through ``failed``."""
    question = json.dumps(
        {"row": asdict(row), "device": asdict(device), "problem": asdict(problem)}
    )
    try:
        answer = subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-m", __name__],
            input=question,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    except subprocess.TimeoutExpired:
        return failed(Objection("self-test-timeout", {"seconds": f"{timeout:.0f}"}))
    results = [line for line in answer.stdout.splitlines() if line.startswith(_MARK)]
    if results:
        return self_test_from(json.loads(results[-1].removeprefix(_MARK)))
    last = (answer.stderr.strip().splitlines() or [""])[-1][:200]
    error = f"its process {_death(answer.returncode)}; {last}".rstrip("; ")
    # Only the system kills like this, where memory is short.
    killed = os.name == "posix" and answer.returncode == -signal.SIGKILL
    code = "self-test-no-memory" if killed else "self-test-crashed"
    return failed(Objection(code, {"error": error}))


def self_test_from(values: Mapping[str, Any]) -> SelfTest:
    """The SelfTest that ``dataclasses.asdict`` turned into these values."""
    objection = values["objection"]
    return SelfTest(**{**values, "objection": Objection(**objection) if objection else None})


def _death(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _row_from(values: Mapping[str, Any]) -> Implementation:
    """JSON has lists where a row has tuples."""
    fields: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in values.items()
    }
    return Implementation(**fields)


def main() -> None:
    """Answer the question on standard input."""
    from sagewan.attention.self_test import examine

    question = json.load(sys.stdin)
    row, device = _row_from(question["row"]), Device(**question["device"])
    test = examine(row, device, Problem(**question["problem"]))
    sys.stdout.write(f"\n{_MARK}{json.dumps(asdict(test))}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
