"""``sagewan calibrate``: measures a model once, for --cache mag or for quantising its weights."""

import argparse
from pathlib import Path

from sagewan.cli.flags import add_request_flags, request_from
from sagewan.cli.generate import stopped_by_signals
from sagewan.cli.show import shown
from sagewan.errors import RequestError
from sagewan.pipeline.progress import Watch
from sagewan.plan.counted import counted
from sagewan.plan.request import Request

# Where none is given; the demo model knows these words.
_PROMPT = "a red ball rolls to the right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What for, and the fields of a request: a step cache's holds for its model, LoRAs and steps,
    that of weights for its model."""
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("cache", "weights"),
        default="cache",
        help="cache: what --cache mag goes by; weights: where the inputs of layers lie, by which "
        "fp8_scaled and fp4_scaled round weights from then on (cache)",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="for weights: a video of each line"
    )
    add_request_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, keep it, and say what it is."""
    for_weights = arguments.purpose == "weights"
    if arguments.prompts and not for_weights:
        raise RequestError("prompts: one video measures a step cache; leave it out")
    request = request_from(arguments, prompt=_PROMPT)
    watch = Watch()
    with stopped_by_signals(watch), shown(watch):
        if for_weights:
            told = _for_weights(request, arguments.prompts, watch)
        else:
            told = _for_cache(request, watch)
    for line in told:
        print(line)
    return 0


def _for_weights(request: Request, prompts: Path | None, watch: Watch) -> list[str]:
    from sagewan.pipeline.libraries import import_libraries

    import_libraries()
    from sagewan.pipeline.inputs import DIRECTIONS, measure_inputs

    found = measure_inputs(request, prompts, watch)
    what = f"{found.plan.model.name}, {counted(found.layers, 'layer')}"
    return [
        f"{what}: at least {found.least:.0%} of the inputs lies along {DIRECTIONS} directions",
        *(f"kept in {path}; fp8_scaled and fp4_scaled go by it" for path in found.paths),
    ]


def _for_cache(request: Request, watch: Watch) -> list[str]:
    from sagewan.pipeline.calibrate import calibrate

    found = calibrate(request, watch)
    steps = found.plan.steps
    numbers = " ".join("–" if x is None else f"{x:.3f}" for x in found.magnitudes)
    reused = ", ".join(str(step + 1) for step in found.reused) or "none"
    what = f"{found.plan.model.name}, {counted(steps.count, 'step')}, shift {steps.shift:g}"
    return [
        f"{what}: {numbers}",
        f"--cache {found.cache} reuses {len(found.reused)} of {steps.count} steps: {reused}",
        f"kept in {found.path}",
    ]
