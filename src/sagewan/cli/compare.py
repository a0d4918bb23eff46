"""``sagewan compare``: one prompt and seed in several settings, side by side."""

import argparse
import shlex
from dataclasses import replace
from typing import Any

from sagewan.cli.flags import FLAGS, add_request_flags, request_from
from sagewan.cli.generate import stopped_by_signals
from sagewan.cli.show import shown
from sagewan.errors import RequestError
from sagewan.pipeline.progress import Watch
from sagewan.plan.parse import REPEATED, parsed
from sagewan.plan.request import Request
from sagewan.plan.serialize import field_types, request_to_json

_TRUE, _FALSE = ("yes", "true", "on"), ("no", "false", "off")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of a request, which all settings share, and the settings."""
    add_request_flags(parser)
    parser.add_argument(
        "--with",
        dest="settings",
        action="append",
        default=[],
        metavar='"FIELD=VALUE …"',
        help='one of two to four settings, such as "attention=sageattn_3 steps=20"; the first is '
        "what the others are measured against",
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the videos and the files that compare them; print the table."""
    from sagewan.pipeline.compare import compare, variants_of

    request = request_from(arguments)
    variants = variants_of(request, [_change(request, text) for text in arguments.settings])
    watch = Watch()
    with stopped_by_signals(watch), shown(watch):
        comparison = compare(variants, watch=watch)
    print(comparison.table(), end="")
    print(f"side by side: {comparison.side_by_side}; differences: {comparison.difference}")
    return 0


def _change(request: Request, text: str) -> dict[str, Any]:
    """``attention=sdpa emulate=yes`` → the fields, as JSON; refused where they don't fit."""
    texts: dict[str, Any] = {}
    for word in _words(text):
        field, equals, value = word.partition("=")
        field = field.replace("-", "_")
        if not equals or field not in FLAGS:
            raise RequestError(f"with={word}: write FIELD=VALUE, such as attention=sageattn_3")
        if field_types()[field] in REPEATED:
            texts[field] = [*texts.get(field, []), value]
        else:
            texts[field] = _truth(value) if field_types()[field] is bool else value
    change = {field: parsed(field, value) for field, value in texts.items()}
    plain = request_to_json(replace(request, **change))
    return {field: plain[field] for field in change}


def _truth(value: str) -> bool:
    if value.lower() not in (*_TRUE, *_FALSE):
        raise RequestError(f"with={value}: write yes or no")
    return value.lower() in _TRUE


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RequestError(f"with={text}: {error}") from None
