"""One widget for each field of a request, by its name; where it stands is the page's affair."""

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from sagewan.pipeline.probe import probe
from sagewan.plan.lora import Lora
from sagewan.plan.models import Sampling
from sagewan.plan.modes import AUTO, MODES, PRESETS
from sagewan.plan.request import QUANTIZATIONS, SCHEDULERS
from sagewan.ui.found import lora_choices, model_choices
from sagewan.ui.planned import preset_here
from sagewan.ui.words import Words

_SIZES = ("256x256", "480x832", "832x480", "720x1280", "1280x720", "1280x704", "1920x1080")
_DTYPES = ("auto", "bfloat16", "float16", "float32")

Choices = list[tuple[str, str]]


class Widgets:
    """Makes the widgets of a page. ``made`` has those that stand on it, by name."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.made: dict[str, Any] = {}

    def __call__(self, name: str, **options: Any) -> Any:
        """The widget called ``name``, placed where the caller is in the layout."""
        words = self.words
        common: dict[str, Any] = {
            "label": words(f"field.{name}"),
            "elem_id": f"field-{name.replace('.', '-')}",
            **options,
        }
        if name not in ("image", "last_image"):
            common.setdefault("info", words(f"info.{name}"))
        self.made[name] = _MAKE[name](words, common)
        return self.made[name]


def _text(lines: int = 1) -> Callable[[Words, dict[str, Any]], Any]:
    return lambda _, common: gr.Textbox(lines=lines, max_lines=max(lines, 8), **common)


def _switch(on: bool = False) -> Callable[[Words, dict[str, Any]], Any]:
    return lambda _, common: gr.Checkbox(value=on, **common)


class _Picture(gr.Image):
    """gradio's, but for that the file is not opened before a handler has it: what is no picture is
    refused beside its field."""

    # So that the page shows the widget of the class above.
    is_template = True

    def preprocess(self, payload: Any) -> Any:
        return payload and payload.path


def _picture(_: Words, common: dict[str, Any]) -> Any:
    return _Picture(
        type="filepath", sources=["upload", "clipboard"], height=180, buttons=[], **common
    )


def _choice(
    choices: Callable[[Words], Choices], value: str = "", *, custom: bool = False
) -> Callable[[Words, dict[str, Any]], Any]:
    def make(words: Words, common: dict[str, Any]) -> Any:
        return gr.Dropdown(choices(words), value=value, allow_custom_value=custom, **common)

    return make


def _named(*names: str) -> Callable[[Words], Choices]:
    """An automatic choice, then these names as they are."""
    return lambda words: [(words("choice.default"), ""), *((name, name) for name in names)]


def _models(_: Words) -> Choices:
    return [(name, name) for name in model_choices()]


def _modes_or_none(words: Words) -> Choices:
    return [(words("choice.none"), ""), *((name, name) for name in MODES)]


def _sizes(words: Words) -> Choices:
    return [(words("choice.default"), ""), *((size, size) for size in _SIZES)]


def _devices(_: Words) -> Choices:
    cards = [device.torch_name for device in probe().usable]
    return [(name, name) for name in ("auto", "cpu", *cards)]


def _preset(words: Words, common: dict[str, Any]) -> Any:
    fitting = preset_here(probe())

    def label(name: str) -> str:
        text = f"{name} ({words.sentence(PRESETS[name].memory)})"
        return words("choice.fits", name=text) if name == fitting else text

    choices = [(words("choice.no_preset"), ""), *((label(name), name) for name in PRESETS)]
    return gr.Radio(choices, value="", **common)


def _lora_files(words: Words) -> Choices:
    def label(name: str, lora: Lora) -> str:
        plain = name.removeprefix(f"{lora.expert}=")
        return words(f"choice.{lora.expert}", name=plain) if lora.expert else name

    return [(label(name, lora), name) for name, lora in lora_choices().items()]


def _loras(words: Words, common: dict[str, Any]) -> Any:
    return gr.Dropdown(_lora_files(words), multiselect=True, **common)


def choices_now(words: Words, values: Mapping[str, Any]) -> Mapping[str, Choices]:
    """The lists that follow the files of this machine, by widget, as they are now. A LoRA file that
    is gone stays in its list while it is chosen: it is refused beside the field, which gradio would
    not let happen; and a list of several that takes any text empties the form when it is loaded."""
    files = _lora_files(words)
    here = {name for _, name in files}
    gone = [(name, name) for name in values.get("lora") or [] if name not in here]
    return {"model": _models(words), "lora": [*files, *gone]}


def _plain(names: tuple[str, ...]) -> Callable[[Words], Choices]:
    return lambda _: [(name, name) for name in names]


_MAKE: Mapping[str, Callable[[Words, dict[str, Any]], Any]] = {
    "prompt": _text(3),
    "negative": _text(2),
    # A file may be gone, or a card: what a draft or a video names is then refused beside its field.
    "model": _choice(_models, "demo", custom=True),
    "image": _picture,
    "last_image": _picture,
    "output": _text(),
    "preset": _preset,
    "attention": _choice(_named(*MODES, AUTO)),
    "attention_ends": _choice(_modes_or_none),
    "attention_ends.first": _text(),
    "attention_ends.last": _text(),
    "attention_keep_layers": _text(),
    "sparsity": _text(),
    "quantization": _choice(_named(*QUANTIZATIONS)),
    "block_swap": _text(),
    "cache": _text(),
    "lora": _loras,
    "lora.strength": _text(),
    "steps": _text(),
    "cfg": _text(),
    "cfg_2": _text(),
    "boundary": _text(),
    "shift": _text(),
    "scheduler": _choice(_named(*SCHEDULERS)),
    "seed": _text(),
    "size": _choice(_sizes, custom=True),
    "frames": _text(),
    "fps": _text(),
    "device": _choice(_devices, "auto", custom=True),
    "dtype": _choice(_plain(_DTYPES), "auto"),
    "strict": _switch(),
    "emulate": _switch(),
    "metadata": _switch(on=True),
    "report": _switch(),
}


def placeholders(sampling: Sampling) -> dict[str, Any]:
    """What a model takes where nothing is said, shown in the empty widgets."""
    values: dict[str, object] = {
        "steps": sampling.steps,
        "cfg": f"{sampling.cfg:g}",
        "cfg_2": "–" if sampling.cfg_2 is None else f"{sampling.cfg_2:g}",
        "shift": f"{sampling.shift:g}",
        "frames": sampling.frames,
        "fps": sampling.fps,
    }
    return {name: gr.update(placeholder=str(value)) for name, value in values.items()}
