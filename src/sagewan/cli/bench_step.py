"""``sagewan bench step``: a whole denoising step, ours beside diffusers', checked, then timed."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from sagewan.cli.bench import about, add_common_arguments, chosen_of
from sagewan.cli.streams import say
from sagewan.errors import RequestError
from sagewan.plan.modes import AUTO, MODES
from sagewan.plan.request import QUANTIZATIONS

if TYPE_CHECKING:
    from sagewan.bench.contestants import Setting
    from sagewan.bench.growth import Growth
    from sagewan.bench.step import Measured

_WRONG = 4
_QUANTIZATIONS = tuple(name for name in QUANTIZATIONS if name != AUTO)
_RIVALS = ("eager", "fa2", "compiled")
_COLUMNS = (
    ("", 36),
    ("ms a layer", 11),
    ("× eager", 9),
    ("× compiled", 11),
    ("s a step", 9),
    ("% of floor", 11),
    ("extra GiB", 10),
    ("error", 8),
)
_WIDTHS = tuple(width for _, width in _COLUMNS)
_STAGES = (36, 11, 13, 11, 17, 13)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``sagewan bench step``."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="whose widths: 1.3b, 5b, 14b, a published model's name, or tiny; 14b if left out, "
        "and tiny on a CPU",
    )
    parser.add_argument("--size", metavar="SIZE", help="480p (if left out), 720p or WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, metavar="N", help="81 if left out")
    parser.add_argument("--tokens", type=int, metavar="N", help="about so many, instead of frames")
    parser.add_argument(
        "--modes",
        default=",".join(MODES),
        metavar="MODE,…",
        help="attention modes; all if left out",
    )
    parser.add_argument(
        "--quantizations",
        default=",".join(_QUANTIZATIONS),
        metavar="NAME,…",
        help="of the weights; none, fp8_scaled and fp4_scaled if left out",
    )
    parser.add_argument(
        "--rivals",
        metavar="NAME,…",
        help="diffusers as it is (eager, always measured), with torch's FlashAttention 2 (fa2), "
        "with its blocks compiled (compiled); all on a GPU and eager on a CPU if left out",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="runs of each; 5 if left out, with --growth 3"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="instead: seconds a step against tokens, from 8,000 to 250,000, of diffusers, ours in "
        "bf16, and the last of --quantizations with the last of --modes that runs here",
    )
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 4 where one of our own was not right."""
    _check_growth(arguments)
    modes = chosen_of(arguments.modes, "modes", tuple(MODES))
    quantizations = chosen_of(arguments.quantizations, "quantizations", _QUANTIZATIONS)
    _check_counts(arguments)
    from sagewan.pipeline.files import check_file, written_whole

    if arguments.json:
        check_file("json", arguments.json)
    setting = _setting(arguments)
    say(_intended(setting))
    if arguments.growth:
        report, code = _growth(setting, arguments, quantizations, modes)
    else:
        report, code = _table(setting, arguments, quantizations, modes)
    if arguments.json:
        with written_whole(arguments.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return code


def _check_growth(arguments: argparse.Namespace) -> None:
    """RequestError for what --growth decides itself."""
    for name in ("tokens", "frames", "rivals"):
        value = getattr(arguments, name)
        if arguments.growth and value is not None:
            raise RequestError(
                f"{name}={value}: --growth has lengths and rivals of its own; leave out one of both"
            )


def _check_counts(arguments: argparse.Namespace) -> None:
    for name in ("frames", "tokens", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RequestError(f"{name}={value}: give 1 or more")


def _setting(arguments: argparse.Namespace) -> "Setting":
    """What is measured where; RequestError for what there is not."""
    from sagewan.bench.case import case_of, model_of
    from sagewan.bench.contestants import Setting
    from sagewan.pipeline.probe import probe

    hardware = probe()
    device = hardware.device(arguments.device)
    model = model_of(arguments.model or ("14b" if device.is_cuda else "tiny"))
    small = model.name == "tiny"
    size = arguments.size or ("128x96" if small else "480p")
    frames = arguments.frames or (17 if small else 81)
    case = case_of(model, size, frames, arguments.tokens)
    return Setting(case=case, device=device, hardware=hardware, emulate=arguments.emulate)


def _intended(setting: "Setting") -> str:
    case = setting.case
    return (
        f"random weights in the widths of {case.model.name} (one of its {case.model.layers} "
        f"layers), {case.tokens:,} tokens, on {setting.device.name}"
    )


def _table(
    setting: "Setting",
    arguments: argparse.Namespace,
    quantizations: Sequence[str],
    modes: Sequence[str],
) -> tuple[dict[str, object], int]:
    from sagewan.bench.contestants import contestants
    from sagewan.bench.step import ROUNDS, measure, rate_of

    default = ",".join(_RIVALS) if setting.device.is_cuda else "eager"
    rivals = chosen_of(arguments.rivals or default, "rivals", _RIVALS)
    chosen, refused = contestants(setting, rivals, quantizations, modes)
    for name, why in refused.items():
        say(f"{name} is left out: {why}")
    rounds = arguments.rounds or ROUNDS
    found = measure(setting, chosen, rounds=rounds)
    rate = rate_of(setting)
    for line in _lines(found):
        print(line)
    for weights, how in {one.weights: one.products for one in found}.items():
        say(f"{weights}: matrices are multiplied as {how}")
    for blocks, chunks in dict.fromkeys((one.blocks, one.chunks) for one in found):
        tokens, heads = ("all" if count is None else f"{count:,}" for count in chunks)
        say(f"blocks of {blocks}: {tokens} tokens and {heads} heads at a time")
    for line in _once_a_run(found):
        say(line)
    if rate is not None:
        say(
            f"the floor is the arithmetic at the card's listed {rate.bits16:g} TFLOPS in 16 bit "
            f"and {rate.fp8:g} in 8 bit"
        )
    report = {
        **_about(setting),
        "peak_tflops": None if rate is None else asdict(rate),
        "rounds": rounds,
        "left_out": refused,
        "work": _work(setting),
        "results": [asdict(one) for one in found],
    }
    ours = [one for one in found if one.wrong and one.name.startswith("ours")]
    return report, _WRONG if ours else 0


def _once_a_run(found: Sequence["Measured"]) -> Iterator[str]:
    """What of a layer the times leave out, and of whom they don't: later steps of a run do neither
    more nor less than what is timed."""
    kept = {one.weights: one.text_ms for one in found if one.text_ms is not None}
    if kept:
        each = ", ".join(f"{weights} {ms:.2f} ms" for weights, ms in kept.items())
        yield (
            "the text's keys and values, computed once a run, are not in it; for a layer and one "
            f"text they take: {each}"
        )
    others = [one.name for one in found if one.wrong is None and one.text_ms is None]
    if others:
        yield f"in every pass they are computed by: {', '.join(others)}"


def _growth(
    setting: "Setting",
    arguments: argparse.Namespace,
    quantizations: Sequence[str],
    modes: Sequence[str],
) -> tuple[dict[str, object], int]:
    from sagewan.bench.growth import ROUNDS, TOKENS, TOKENS_ON_CPU, grow

    tokens = TOKENS if setting.device.is_cuda else TOKENS_ON_CPU
    rounds = arguments.rounds or ROUNDS
    found = grow(setting, tokens, quantizations[-1], modes, rounds=rounds, told=say)
    for line in _growth_lines(found):
        print(line)
    return {**_about(setting), "rounds": rounds, "growth": [asdict(one) for one in found]}, 0


def _about(setting: "Setting") -> dict[str, object]:
    case = setting.case
    return {
        **about(setting.device, setting.hardware),
        "model": case.model.name,
        "layers": case.model.layers,
        "latents": case.latents,
        "tokens": case.tokens,
        "dtype": "bfloat16",
    }


def _work(setting: "Setting") -> dict[str, object]:
    """Operations and bytes of a layer's products, by the bits of its matrices, and attention;
    ``later_products`` those of a pass that has the text's keys and values already."""
    from sagewan.bench import floor

    def products(*, keeps_text: bool) -> dict[str, object]:
        found: dict[str, object] = {}
        for bits in (16, 8, 4):
            arithmetic = floor.Arithmetic(products=bits)
            work = floor.products(setting.case, arithmetic, keeps_text=keeps_text)
            found[str(bits)] = asdict(work)
        return found

    return {
        "products": products(keeps_text=False),
        "later_products": products(keeps_text=True),
        "attention": asdict(floor.attention(setting.case)),
    }


def _lines(found: Sequence["Measured"]) -> Iterator[str]:
    yield _line([title for title, _ in _COLUMNS])
    for one in found:
        cells = (
            one.name,
            _shown(one.layer_ms, lambda x: f"{x:.2f}"),
            _shown(one.over_eager, lambda x: f"{x:.2f}"),
            _shown(one.over_compiled, lambda x: f"{x:.2f}"),
            _shown(one.step_seconds, lambda x: f"{x:.2f}"),
            _shown(one.of_floor, lambda x: f"{100 * x:.0f}"),
            _shown(one.extra_bytes, lambda x: f"{x / 2**30:.2f}"),
            _shown(one.error, lambda x: f"{x:.4f}"),
        )
        yield _line((one.name, f"  not timed: {one.wrong}") if one.wrong else cells)
    staged = [one for one in found if one.stages]
    if staged:
        yield ""
        yield _line(("ms a layer, by stage", *(staged[0].stages or ()), "all kernels"), _STAGES)
    for one in staged:
        spent = (one.stages or {}).values()
        yield _line((one.name, *(f"{x:.2f}" for x in (*spent, sum(spent)))), _STAGES)


def _growth_lines(found: Sequence["Growth"]) -> Iterator[str]:
    for one in found:
        yield f"{one.name}: {one.linear:.3g} s a token and {one.quadratic:.3g} s a pair of tokens"
        for tokens, seconds in one.points:
            model = one.linear * tokens + one.quadratic * tokens**2
            share = seconds / model
            yield f"{tokens:>12,} tokens {seconds:>9.2f} s a step, {share:.3f} of the model"


def _shown(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


def _line(cells: Sequence[str], widths: Sequence[int] = _WIDTHS) -> str:
    first, *others = (
        text.ljust(width) if place == 0 else text.rjust(width)
        for place, (text, width) in enumerate(zip(cells, widths, strict=False))
    )
    return "".join((first, *others)).rstrip()
