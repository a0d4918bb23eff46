"""``sagewan evaluate``: what each attention mode and quantization costs in quality."""

import argparse
from pathlib import Path

from sagewan.cli.flags import add_field_flags, fields_from
from sagewan.cli.generate import stopped_by_signals
from sagewan.cli.show import shown
from sagewan.errors import RequestError
from sagewan.pipeline.progress import Watch
from sagewan.plan.modes import MODES
from sagewan.plan.parse import OFF, parsed
from sagewan.plan.request import NO_QUANTIZATION, Request
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache

# The fields of a request that all clips share.
_FIELDS = (
    *("model", "negative", "lora", "steps", "cfg", "cfg_2", "boundary", "shift", "scheduler"),
    *("size", "frames", "device", "dtype", "emulate"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to evaluate, and the fields of a request that all clips share."""
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line (the demo has its own)"
    )
    parser.add_argument(
        *("-a", "--attention"),
        nargs="+",
        default=list(MODES),
        metavar="MODE",
        help=f"the modes to evaluate (all: {', '.join(MODES)})",
    )
    parser.add_argument(
        *("-q", "--quantization"),
        nargs="+",
        default=[NO_QUANTIZATION],
        metavar="Q",
        help="the quantizations to evaluate each mode with: none, fp8_scaled, fp4_scaled (none)",
    )
    parser.add_argument(
        "--sparsity",
        nargs="+",
        default=[OFF],
        metavar="KIND:S",
        help="what of attention is left out in all of these, such as none radial:0.75 (none)",
    )
    parser.add_argument(
        "--cache",
        nargs="+",
        default=[OFF],
        metavar="CACHE",
        help="the step caches to evaluate all of these with, such as none easy:0.05 (none)",
    )
    parser.add_argument(
        "--count", metavar="N", help="how many prompts (all of the file; 16 of the demo's own)"
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        help="clips made at once (small ones together: 256 of the demo's on a GPU, 4 on a CPU)",
    )
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="where the table goes; one that was stopped there goes on (evaluation)",
    )
    parser.add_argument(
        "--seed", default="0", metavar="N", help="of the first clip; each next has one more (0)"
    )
    add_field_flags(parser, _FIELDS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the table."""
    fields = {"seed": parsed("seed", arguments.seed)} | fields_from(arguments, _FIELDS)
    for mode in arguments.attention:
        for kind in arguments.quantization:
            # Refuses unknown names as everywhere.
            Request(prompt="evaluate", attention=mode, quantization=kind)
    sparsities: list[Sparsity | None] = [parsed("sparsity", text) for text in arguments.sparsity]
    caches: list[StepCache | None] = [parsed("cache", text) for text in arguments.cache]
    request = Request(prompt="evaluate", **fields)
    count, batch = _number("count", arguments.count), _number("batch", arguments.batch)
    from sagewan.evaluate.run import Evaluation, evaluate

    evaluation = Evaluation(
        request=request,
        attention=tuple(arguments.attention),
        quantization=tuple(arguments.quantization),
        sparsity=tuple(sparsities),
        cache=tuple(caches),
        folder=arguments.output,
        prompts=arguments.prompts,
        count=count,
        batch=batch,
    )
    watch = Watch()
    with stopped_by_signals(watch), shown(watch):
        evaluated = evaluate(evaluation, watch=watch)
    print(evaluated.table, end="")
    print(f"\nin {evaluated.folder}: table.md, table.json, table.svg, clips.jsonl")
    return 0


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise RequestError(f"{name}={text}: write a whole number")
    return int(text)
