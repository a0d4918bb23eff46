"""A whole denoising step by each contestant: checked against diffusers, then timed in turns.

What is timed is a transformer of one block, with and without the block: the difference is a
layer's time, and a step is all its layers and the ends, twice for guidance. Runs are interleaved,
so that the GPU's clock, which its power limits, is the same for all.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sagewan.attention.launch import is_out_of_memory
from sagewan.attention.peak import clock_mhz
from sagewan.attention.resolve import one_line
from sagewan.bench import floor
from sagewan.bench.contestants import BASELINE, COMPILED, Contestant, Setting, random_inputs
from sagewan.bench.stages import by_stage, kernels_of
from sagewan.plan.speed import RATES, Rate, card_of

ROUNDS = 5
# How many of a layer's kernels are told, and how much of a name.
_KERNELS, _NAME = 20, 100
_GUIDED = 2  # passes of a step: with the prompt, and without


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contestant. ``layer_ms`` is of one block, ``ends_ms`` of all that is outside the blocks;
    ``text_ms`` what of a block is computed once a run and is not in ``layer_ms``: the keys and
    values of one text, None where each pass computes them; ``of_floor`` the share of the time that
    the arithmetic would take at the listed rates;
    ``extra_bytes`` the memory of a pass beyond the weights, of which a block has ``block_bytes``;
    ``stages`` the milliseconds of a layer, ``kernels`` those of its longest. None where that can't
    be known. ``wrong`` says why it was not timed."""

    name: str
    weights: str
    products: str
    attention: str
    blocks: str
    chunks: tuple[int | None, int | None] = (None, None)
    error: float | None = None
    layer_ms: float | None = None
    ends_ms: float | None = None
    text_ms: float | None = None
    step_seconds: float | None = None
    over_eager: float | None = None
    over_compiled: float | None = None
    floor_ms: float | None = None
    of_floor: float | None = None
    extra_bytes: int | None = None
    block_bytes: int = 0
    clock_mhz: int | None = None
    stages: Mapping[str, float] | None = None
    kernels: Mapping[str, float] = field(default_factory=dict)
    wrong: str | None = None


def rate_of(setting: Setting) -> Rate | None:
    """The card's listed rates, None for a card that is not listed."""
    card = card_of(setting.device)
    return None if card is None else RATES[card]


def measure(
    setting: Setting,
    chosen: Sequence[Contestant],
    *,
    rounds: int = ROUNDS,
    profiled: bool = True,
    told: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Each contestant on the same inputs. One that fails or is not right is not timed; where the
    baseline fails, the others are timed without an error."""
    inputs = random_inputs(setting.case, setting.device)
    # Events and counts of memory are those of torch's current GPU.
    with torch.cuda.device_of(inputs["hidden_states"]):
        checked = []
        reference: Tensor | None = None
        for one in chosen:
            told(one.name)
            found, prediction = _checked(setting, one, inputs, reference)
            if one.name == BASELINE:
                reference = prediction
            checked.append((one, found))
        racing = [one for one, found in checked if found.wrong is None]
        times, clocks = _in_turns(racing, inputs, rounds)
        results = []
        for one, found in checked:
            if found.wrong is None:
                found = _timed(setting, found, one, statistics.median(times[one.name]))
                found = replace(found, clock_mhz=clocks.get(one.name))
                if profiled and setting.device.is_cuda:
                    found = _profiled(found, one, inputs)
            results.append(found)
    return list(_compared(results))


def _checked(
    setting: Setting, one: Contestant, inputs: Mapping[str, Tensor], reference: Tensor | None
) -> tuple[Measured, Tensor | None]:
    """Its error, its memory and what its ends take; the prediction."""
    found = Measured(
        name=one.name,
        weights=one.weights,
        products=one.products,
        attention=one.attention,
        blocks=one.blocks,
        chunks=one.chunks,
        block_bytes=one.block_bytes,
    )
    try:
        prediction = one.predict(inputs)
        error = 0.0 if one.name == BASELINE else None
        if reference is not None:
            error = _error(prediction, reference)
        if error is not None and not error <= one.limit:
            return replace(found, error=error, wrong=f"error above {one.limit:.2f}"), None
        extra = _extra_bytes(one, inputs) if setting.device.is_cuda else None
        one.ends(inputs)
        ends = statistics.median(_milliseconds(one.ends, inputs)[0] for _ in range(3))
        text_ms = _text_ms(one, inputs) if one.keeps_text else None
    except Exception as failure:  # a rival may fail in any way; it is told, not hidden
        if is_out_of_memory(failure):
            torch.cuda.empty_cache()
        return replace(found, wrong=one_line(failure)), None
    found = replace(found, error=error, extra_bytes=extra, ends_ms=ends, text_ms=text_ms)
    return found, prediction


def _text_ms(one: Contestant, inputs: Mapping[str, Tensor]) -> float:
    text = one.text(inputs)

    def compute(_: Mapping[str, Tensor]) -> object:
        return one.text_keys(text)

    compute(inputs)
    return statistics.median(_milliseconds(compute, inputs)[0] for _ in range(3))


def _error(prediction: Tensor, reference: Tensor) -> float:
    difference = (prediction.double() - reference.double()).norm() / reference.double().norm()
    return float(difference)


def _extra_bytes(one: Contestant, inputs: Mapping[str, Tensor]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one.predict(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _in_turns(
    racing: Sequence[Contestant], inputs: Mapping[str, Tensor], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of ``rounds`` passes each, one of each in turn, each round from another one on;
    and the clock of the last."""
    times: dict[str, list[float]] = {one.name: [] for one in racing}
    clocks: dict[str, int] = {}
    for turn in range(rounds):
        first = turn * len(racing) // rounds
        for one in (*racing[first:], *racing[:first]):
            spent, clock = _milliseconds(one.predict, inputs)
            times[one.name].append(spent)
            if clock is not None:
                clocks[one.name] = clock
    return times, clocks


def _milliseconds(
    run: Callable[[Mapping[str, Tensor]], object], inputs: Mapping[str, Tensor]
) -> tuple[float, int | None]:
    """One call, and the multiprocessors' clock in MHz while it ran."""
    device = inputs["hidden_states"].device
    if device.type == "cpu":
        begin = time.perf_counter()
        run(inputs)
        return (time.perf_counter() - begin) * 1000, None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(inputs)
    end.record()
    clock = clock_mhz(device)
    end.synchronize()
    return start.elapsed_time(end), clock


def _timed(setting: Setting, found: Measured, one: Contestant, whole: float) -> Measured:
    """With a layer's and a step's time, of the time of a pass."""
    ends = found.ends_ms or 0.0
    layer = max(whole - ends, 1e-6)
    rate = rate_of(setting)
    least = None
    if rate is not None:
        kept = one.keeps_text
        least = floor.floor_ms(setting.case, one.arithmetic, rate, keeps_text=kept)
    return replace(
        found,
        layer_ms=layer,
        step_seconds=_GUIDED * (setting.case.model.layers * layer + ends) / 1000,
        floor_ms=least,
        of_floor=None if least is None else least / layer,
    )


def _profiled(found: Measured, one: Contestant, inputs: Mapping[str, Tensor]) -> Measured:
    """With a layer's time by stage: a pass's, less what its ends take."""
    whole = kernels_of(lambda: one.predict(inputs))
    ends = kernels_of(lambda: one.ends(inputs))
    own = {name: spent - ends.get(name, 0.0) for name, spent in whole.items()}
    most = sorted(own.items(), key=lambda pair: -pair[1])[:_KERNELS]
    # Names that compilers make can be thousands of characters long.
    kernels = {name[:_NAME]: spent for name, spent in most}
    return replace(found, stages=by_stage(own.items()), kernels=kernels)


def _compared(results: Sequence[Measured]) -> Iterator[Measured]:
    """With how many times the speed of diffusers' own each has."""
    times = {found.name: found.layer_ms for found in results}
    for found in results:
        yield replace(
            found,
            over_eager=_ratio(times.get(BASELINE), found.layer_ms),
            over_compiled=_ratio(times.get(COMPILED), found.layer_ms),
        )


def _ratio(other: float | None, own: float | None) -> float | None:
    return None if other is None or own is None else other / own
