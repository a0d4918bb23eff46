"""``sagewan calibrate``: measures a model once, for --cache mag."""

import argparse

from sagewan.cli.flags import add_request_flags, request_from
from sagewan.cli.generate import stopped_by_signals
from sagewan.cli.show import shown
from sagewan.pipeline.progress import Watch
from sagewan.plan.counted import counted

# Where none is given; the demo model knows these words.
_PROMPT = "a red ball rolls to the right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of a request: what is measured holds for its model, LoRAs and steps."""
    add_request_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, keep it, and say what a cache would reuse."""
    request = request_from(arguments, prompt=_PROMPT)
    from sagewan.pipeline.calibrate import calibrate

    watch = Watch()
    with stopped_by_signals(watch), shown(watch):
        found = calibrate(request, watch)
    steps = found.plan.steps
    numbers = " ".join("–" if x is None else f"{x:.3f}" for x in found.magnitudes)
    print(
        f"{found.plan.model.name}, {counted(steps.count, 'step')}, shift {steps.shift:g}: {numbers}"
    )
    reused = ", ".join(str(step + 1) for step in found.reused) or "none"
    print(
        f"--cache {found.cache} reuses "
        f"{len(found.reused)} of {counted(steps.count, 'step')}: {reused}"
    )
    print(f"kept in {found.path}")
    return 0
