"""One flag for each field of a request, matched by name."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagewan.cli.streams import say
from sagewan.errors import RequestError
from sagewan.plan.models import DEMO, PUBLISHED
from sagewan.plan.modes import AUTO, MODES, PRESETS
from sagewan.plan.parse import REPEATED, parsed
from sagewan.plan.request import QUANTIZATIONS, SCHEDULERS, Request
from sagewan.plan.serialize import field_types, settings_from_json


@dataclass(frozen=True)
class Flag:
    """What --help says of a field: its value's name, a sentence, and a one-letter form."""

    metavar: str
    help: str
    short: str | None = None


FLAGS: Mapping[str, Flag] = {
    "prompt": Flag("PROMPT", "what the video should show, in English or Chinese"),
    "negative": Flag("TEXT", "what it should not show (default: the model's own)"),
    "model": Flag("MODEL", f"a folder, a file, or {', '.join((DEMO, *PUBLISHED))}", "m"),
    "image": Flag("FILE", "the first picture; cropped to the video's proportions", "i"),
    "last_image": Flag("FILE", "the last picture, for models that take it"),
    "output": Flag("FILE", "the video, an .mp4; replaced if it exists (sagewan.mp4)", "o"),
    "preset": Flag("PRESET", f"a starting point: {', '.join(PRESETS)}", "p"),
    "attention": Flag("MODE", f"{', '.join((*MODES, AUTO))} (auto)", "a"),
    "attention_ends": Flag("MODE:N,M", "another mode for the first N and last M steps"),
    "attention_keep_layers": Flag("0,39", "layers that keep the mode of --attention-ends"),
    "sparsity": Flag(
        "KIND:S",
        "leave out this share of attention, radial or sta, but in the first quarter of the steps: "
        "radial:0.75; faster on long videos, another video (none)",
    ),
    "quantization": Flag(
        "Q", f"how the transformer's weights are kept: {', '.join(QUANTIZATIONS)} (auto)", "q"
    ),
    "block_swap": Flag(
        "N", "blocks that wait in host memory, at least; more where the card needs it (auto)"
    ),
    "cache": Flag(
        "METHOD:T",
        "reuse the transformer's answer where it changes little, by at most this share: easy:0.05, "
        "or mag:0.06 after sagewan calibrate; faster, another video (none)",
    ),
    "lora": Flag(
        "FILE[:S]",
        "a LoRA, with a strength if not 1; may be repeated. For one expert of Wan 2.2 A14B: "
        "high=FILE or low=FILE",
    ),
    "steps": Flag("N", "denoising steps"),
    "cfg": Flag("SCALE", "classifier-free guidance; 1 turns it off"),
    "cfg_2": Flag("SCALE", "guidance of the second expert (Wan 2.2 A14B)"),
    "boundary": Flag("0-1", "noise level where the second expert takes over (Wan 2.2 A14B)"),
    "shift": Flag("SHIFT", "shift of the noise schedule; more for larger videos"),
    "scheduler": Flag("NAME", ", ".join(SCHEDULERS)),
    "seed": Flag("N", "the same seed makes the same video (default: drawn, and told)"),
    "size": Flag("WxH", "width and height in pixels, such as 1280x720"),
    "frames": Flag("N", "length in frames, 4n+1"),
    "fps": Flag("N", "frames per second of the file"),
    "device": Flag("DEVICE", "auto, cpu, cuda or cuda:N"),
    "dtype": Flag("DTYPE", "auto, bfloat16, float16 or float32"),
    "strict": Flag(
        "",
        "fail (exit 3) where another attention mode would have to take over from one that is named",
    ),
    "emulate": Flag("", "emulate attention this machine has no hardware for: slow, exact"),
    "metadata": Flag("", "keep the settings, with the paths they name, inside the video"),
    "report": Flag("FILE", "write what ran, as JSON"),
}


def flag_of(field: str) -> str:
    """``last_image`` → ``--last-image``."""
    return "--" + field.replace("_", "-")


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """The prompt by position, other fields as flags, and --from; only what is given is set."""
    parser.add_argument("prompt", nargs="?", default=argparse.SUPPRESS, help=FLAGS["prompt"].help)
    parser.add_argument(
        "--from",
        dest="from_video",
        type=Path,
        metavar="VIDEO",
        help="take the settings from a video that sagewan made; flags given here override them",
    )
    add_field_flags(parser, [field for field in FLAGS if field != "prompt"])


def add_field_flags(parser: argparse.ArgumentParser, fields: Iterable[str]) -> None:
    """The flags of these fields; only what is given is set."""
    for field in fields:
        flag = FLAGS[field]
        names = [flag_of(field)] + ([f"-{flag.short}"] if flag.short else [])
        if field_types()[field] is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(*names, action=action, default=argparse.SUPPRESS, help=flag.help)
        else:
            parser.add_argument(
                *names,
                action="append" if field_types()[field] in REPEATED else "store",
                metavar=flag.metavar,
                default=argparse.SUPPRESS,
                help=flag.help,
            )


def fields_from(arguments: argparse.Namespace, fields: Iterable[str]) -> dict[str, Any]:
    """The values of these fields' flags, of those that were given. Raises RequestError."""
    given = vars(arguments)
    return {field: parsed(field, given[field]) for field in fields if field in given}


def request_from(arguments: argparse.Namespace, *, prompt: str | None = None) -> Request:
    """The request that the flags make, on top of the settings in the --from video if there is one.

    ``prompt`` stands in where none is given. Raises RequestError, one sentence with the fix.
    """
    values: dict[str, Any] = {}
    if arguments.from_video:
        from sagewan.pipeline.export import read_settings

        values = settings_from_json(read_settings(arguments.from_video))
    given = fields_from(arguments, FLAGS)
    values = _as_measured(values, given) | given
    if "prompt" not in values:
        if prompt is None:
            raise RequestError('prompt is missing: say what to show, such as "a red ball"')
        values["prompt"] = prompt
    return Request(**values)


# What decides how much each step changes, beside how many there are, which the plan compares.
_MEASURED_WITH = ("model", "lora", "shift", "scheduler", "boundary")


def _as_measured(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A video's settings, in which its step cache names no steps if those were another's."""
    cache = values.get("cache")
    changed = [name for name in _MEASURED_WITH if name in given and given[name] != values.get(name)]
    if cache is None or cache.recorded is None or "cache" in given or not changed:
        return values
    say(f"the step cache {cache} names steps of another {changed[0]}: what was measured decides")
    return {**values, "cache": replace(cache, recorded=None)}
