"""What stands in the widgets → a request; and a request → what stands in them.

A widget has the name of its field. Fields that take more than one widget have parts,
``field.part``.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sagewan.errors import RequestError
from sagewan.jobs.outputs import file_name
from sagewan.pipeline.draft import ANY_PROMPT
from sagewan.plan.lora import Lora
from sagewan.plan.parse import parsed
from sagewan.plan.request import Ends, Request, unknown_choice
from sagewan.plan.serialize import field_types
from sagewan.ui.found import lora_choices, lora_name, model_choices
from sagewan.ui.uploads import kept_picture

PARTS: Mapping[str, tuple[str, ...]] = {"attention_ends": ("first", "last"), "lora": ("strength",)}
PICTURES = ("image", "last_image")
# Where the video and its report go is for the queue to say.
_PLACEHOLDER = Path("report.json")

Values = Mapping[str, Any]


def names() -> tuple[str, ...]:
    """Every widget, in the order of the fields."""
    return tuple(
        name
        for field in field_types()
        for name in (field, *(f"{field}.{part}" for part in PARTS.get(field, ())))
    )


def request_of(values: Values, *, any_prompt: bool = False) -> Request:
    """The request that the widgets make; with ``any_prompt`` an empty prompt will do.

    Raises RequestError, which begins with the name of the field that is wrong.
    """
    fields: dict[str, Any] = {}
    for field in field_types():
        value = _value(field, values)
        if value is not None:
            fields[field] = value
    if any_prompt and not str(fields.get("prompt", "")).strip():
        fields["prompt"] = ANY_PROMPT
    fields.setdefault("prompt", "")
    return Request(**fields)


def _value(field: str, values: Values) -> Any | None:
    """The value of a field, None where nothing is said."""
    value = values.get(field)
    if value is None or value == "" or value == []:
        return None
    if field in PICTURES:
        return kept_picture(Path(value), field)
    if field == "output":
        return Path(f"{file_name(str(value))}.mp4")
    if field == "report":
        return _PLACEHOLDER if value else None
    if field == "model":
        return _model(str(value))
    if field == "attention_ends":
        return Ends.parse(f"{value}:{_count(values, 'first')},{_count(values, 'last')}")
    if field == "lora":
        return _loras(value, str(values.get("lora.strength") or ""))
    return parsed(field, value if isinstance(value, bool) else str(value).strip())


def _model(name: str) -> str:
    choices = model_choices()
    if name not in choices:
        raise unknown_choice("model", name, choices)
    return choices[name]


def _count(values: Values, part: str) -> str:
    return str(values.get(f"attention_ends.{part}") or 0).strip()


def _loras(chosen: list[str], strengths: str) -> tuple[Lora, ...]:
    choices = lora_choices()
    if absent := next((name for name in chosen if name not in choices), None):
        raise RequestError(f"lora={absent} is not in the folder loras: choose another")
    listed = [text for text in strengths.replace(",", " ").split() if text]
    if len(listed) > len(chosen):
        raise RequestError(
            f"lora has {len(listed)} strengths for {len(chosen)} files: write one each"
        )
    texts = [*listed, *["1"] * (len(chosen) - len(listed))]
    return tuple(
        replace(choices[name], strength=Lora.parse(f"x:{text}").strength)
        for name, text in zip(chosen, texts, strict=True)
    )


def values_of(request: Request) -> dict[str, Any]:
    """What the widgets show for a request."""
    values: dict[str, Any] = {name: _shown(getattr(request, name)) for name in field_types()}
    values |= {name: getattr(request, name) and str(getattr(request, name)) for name in PICTURES}
    values |= {"output": request.output.stem, "report": request.report is not None}
    models = {path: name for name, path in model_choices().items()}
    values["model"] = models.get(request.model, request.model)
    ends = request.attention_ends
    values["attention_ends"] = ends.mode if ends else ""
    values["attention_ends.first"] = str(ends.first) if ends else ""
    values["attention_ends.last"] = str(ends.last) if ends else ""
    # One that is not here keeps its name, and is refused beside its field.
    values["lora"] = [lora_name(lora) for lora in request.lora]
    values["lora.strength"] = ", ".join(f"{lora.strength:g}" for lora in request.lora)
    return values


def _shown(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        joint = "x" if len(value) == 2 else ","
        return joint.join(map(str, value))
    if isinstance(value, bool):
        return value
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
