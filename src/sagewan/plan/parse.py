"""From text to the value of a field, by its type: for flags, comparisons and the app alike."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sagewan.errors import RequestError
from sagewan.plan.lora import Lora
from sagewan.plan.modes import AUTO
from sagewan.plan.request import Ends, parse_layers, parse_size
from sagewan.plan.serialize import field_types
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache


def _whole_number(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise ValueError(text)
    return int(text)


# From a text to a field's value; ValueError where it is not one.
PARSE: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    str: (str, "text"),
    int: (_whole_number, "a whole number"),
    float: (float, "a number"),
    Path: (Path, "a file"),
    Ends: (Ends.parse, "MODE:FIRST,LAST"),
    StepCache: (StepCache.parse, "METHOD:THRESHOLD"),
    Sparsity: (Sparsity.parse, "KIND:SHARE"),
    tuple[int, int]: (parse_size, "WIDTHxHEIGHT"),
    tuple[int, ...]: (parse_layers, "layer numbers"),
    tuple[Lora, ...]: (lambda texts: tuple(map(Lora.parse, texts)), "FILE or FILE:STRENGTH"),
}
# Fields of numbers that are found by the plan where they are not given.
NONE_IS_AUTO = ("block_swap",)
# Fields that are off unless chosen, and can be turned off again.
_NONE_IS_OFF = ("sparsity", "cache")
OFF = "none"
# The types of fields that take several texts, one for each item.
REPEATED = (tuple[Lora, ...],)


def parsed(field: str, value: Any) -> Any:
    """A field's value from a switch, a text, or the texts of a repeated field. RequestError, with
    the fix, if it is of another kind."""
    if isinstance(value, bool):
        return value
    if (field in NONE_IS_AUTO and value == AUTO) or (field in _NONE_IS_OFF and value == OFF):
        return None
    parse, kind = PARSE[field_types()[field]]
    try:
        return parse(value)
    except RequestError:
        raise
    except ValueError:
        raise RequestError(f"{field}={value}: write {kind}") from None
