"""Whether an implementation computes attention on this device, and how fast: numbers, not trust.

Broken wheels are the most reported fault of quantised attention: they fail at import, return noise
or NaN, change their inputs, or end the process. So a row of a package is tried in a process of its
own, with a time limit; whatever happens there becomes an objection.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sagewan.attention.launch import call, is_out_of_memory
from sagewan.attention.problems import LIMITS, TIMED_ON_CPU, TIMED_ON_GPU, trials_for
from sagewan.attention.resolve import Function, ImplementationError, load, one_line
from sagewan.attention.worker import in_own_process
from sagewan.plan.catalogue import Implementation, Problem
from sagewan.plan.evidence import SelfTest
from sagewan.plan.hardware import Device
from sagewan.plan.modes import MODES
from sagewan.plan.objection import Objection
from sagewan.reference.attention import attention_with_lse, relative_error

logger = logging.getLogger(__name__)

_WARM_UPS = 2
_RUNS = 5


def self_test(
    row: Implementation, device: Device, problem: Problem, *, timeout: float = 300
) -> SelfTest:
    """Compare a row with float64 on the device and time it; a failure is in the result.

    The problem gives the head size and the dtype: in others a row may run other code. Rows of
    installed packages run in their own process, for at most ``timeout`` seconds.
    """
    if row.package is None:
        return examine(row, device, problem)
    return in_own_process(row, device, problem, failed=_failed(row), timeout=timeout)


def examine(row: Implementation, device: Device, problem: Problem) -> SelfTest:
    """The self-test itself, in this process."""
    try:
        return _examined(row, device, problem)
    except ImplementationError as failure:
        return _failed(row)(_as_self_test(failure.objection))
    except _Rejected as rejected:
        return _failed(row)(rejected.objection)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(row)(Objection("self-test-no-memory", {"error": one_line(error)}))


def _examined(row: Implementation, device: Device, problem: Problem) -> SelfTest:
    function = load(row)
    # The trial nearest to its limit speaks for all.
    error, limit = max(
        _trials(function, row, device, problem), key=lambda result: result[0] / result[1]
    )
    objection = None
    if error > limit:
        objection = Objection("self-test-error", {"error": f"{error:.2g}", "limit": f"{limit:.2g}"})
    return SelfTest(
        implementation=row.name,
        error=error,
        limit=limit,
        milliseconds=None if objection else _milliseconds(function, row, device, problem),
        objection=objection,
    )


class _Rejected(Exception):
    """A trial that ended the self-test."""

    def __init__(self, objection: Objection) -> None:
        self.objection = objection


def _trials(
    function: Function, row: Implementation, device: Device, problem: Problem
) -> Iterator[tuple[float, float]]:
    """The error and its limit in each trial."""
    for trial in trials_for(row):
        inputs = trial.inputs(problem, device.torch_name)
        before = [x.clone() for x in inputs]
        mask = trial.block_mask(device.torch_name)
        output, lse = call(function, row, *inputs, with_lse=row.log_sum_exp, block_mask=mask)
        if device.is_cuda:
            torch.cuda.synchronize(device.torch_name)
        if not all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)):
            raise _Rejected(Objection("self-test-changed-inputs"))
        yield _error(output, lse, before, mask), LIMITS[trial.family][MODES[row.mode].quality]


def _error(output: Tensor, lse: Tensor | None, inputs: list[Tensor], mask: Tensor | None) -> float:
    """The relative error of the output, or of the log-sum-exp where that is larger."""
    expected, expected_lse = attention_with_lse(*inputs, block_mask=mask)
    if not all(x.isfinite().all() for x in (output, lse) if x is not None):
        raise _Rejected(Objection("self-test-not-finite"))
    error = relative_error(output, expected)
    return error if lse is None else max(error, relative_error(lse, expected_lse))


def _milliseconds(
    function: Function, row: Implementation, device: Device, problem: Problem
) -> float | None:
    """The median time of one call; None where memory does not suffice for the timed problem."""
    trial = TIMED_ON_GPU if device.is_cuda else TIMED_ON_CPU
    try:
        inputs = trial.inputs(problem, device.torch_name)
        measure = _time_on_gpu if device.is_cuda else _time_on_cpu
        with torch.cuda.device_of(inputs[0]):
            times = [
                measure(lambda: call(function, row, *inputs)) for _ in range(_WARM_UPS + _RUNS)
            ]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.info("%s was not timed: too little free memory", row.name)
        return None
    return statistics.median(times[_WARM_UPS:])


def _time_on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _time_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


def _as_self_test(objection: Objection) -> Objection:
    """A failure of the call, told as a failure of its self-test; import errors stay as they are."""
    if objection.code != "run-failed":
        return objection
    return Objection("self-test-crashed", objection.values)


def _failed(row: Implementation) -> Callable[[Objection], SelfTest]:
    def with_objection(objection: Objection) -> SelfTest:
        limit = LIMITS["local"][MODES[row.mode].quality]
        return SelfTest(
            implementation=row.name,
            error=None,
            limit=limit,
            milliseconds=None,
            objection=objection,
        )

    return with_objection
