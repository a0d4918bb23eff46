"""The page: which widget stands where, and which event calls what."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gradio as gr

from sagewan import __version__
from sagewan.pipeline.probe import probe
from sagewan.plan.hardware import GIB
from sagewan.plan.models import DEMO
from sagewan.plan.modes import AUTO, MODES
from sagewan.plan.serialize import field_types
from sagewan.ui.handlers import SLOTS, Answer, Handlers
from sagewan.ui.templates import render, static
from sagewan.ui.widgets import Widgets, choices_now
from sagewan.ui.words import LANGUAGES, Words

# Nothing on this page computes: no event need wait for another.
_EVENT: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}
_SLOT_FIELDS = ("attention", "quantization", "steps")


def build_page(language: str) -> gr.Blocks:
    """The page in one language."""
    return _Page(Words(language)).build()


class _Page:
    def __init__(self, words: Words) -> None:
        self.words = words
        self.widgets = Widgets(words)
        self.handlers = Handlers(words)
        self.slots: list[dict[str, Any]] = []

    def build(self) -> gr.Blocks:
        words = self.words
        page: gr.Blocks
        with gr.Blocks(title=words("app.title"), fill_width=True) as page:
            gr.HTML(self._header(), elem_id="sw-header", js_on_load=None)
            self.answer = gr.HTML("{}", elem_id="sw-answer", js_on_load=static("answer.js"))
            with gr.Tabs(elem_id="sw-tabs") as self.tabs:
                with gr.Tab(words("tab.generate"), id="generate", render_children=True):
                    self._generate_tab()
                with gr.Tab(words("tab.settings"), id="settings", render_children=True):
                    self._settings_tab()
                with gr.Tab(words("tab.library"), id="library"):
                    self.library = self._fragment("library")
                with gr.Tab(words("tab.compare"), id="compare", render_children=True):
                    self._compare_tab()
                with gr.Tab(words("tab.diagnose"), id="diagnose"):
                    self._diagnose_tab()
            self._wire(page)
        return page

    def _header(self) -> str:
        hardware = probe()
        device = self.words("app.no_gpu")
        if hardware.usable:
            card = hardware.usable[0]
            device = f"{card.name} · {card.memory_total / GIB:.0f} GiB"
        other = next(code for code in LANGUAGES if code != self.words.language)
        return render(
            "header",
            self.words,
            device=device,
            other=other,
            version=__version__,
            gpu=bool(hardware.usable),
        )

    def _generate_tab(self) -> None:
        words, widget = self.words, self.widgets
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_classes="sw-left"):
                widget("prompt", placeholder=words("example.prompt"))
                with gr.Accordion(words("section.picture"), open=False), gr.Row():
                    widget("image", min_width=140)
                    widget("last_image", min_width=140)
                widget("preset", elem_classes="sw-presets")
                # In one line: the button below is in sight on a small screen too.
                self._rows(("size", "frames", "steps", "seed"), across=4, min_width=104)
                with gr.Accordion(words("section.leave_out"), open=False):
                    widget("negative")
                self.go = gr.Button(words("button.generate"), variant="primary", elem_id="sw-go")
                gr.HTML('<p id="sw-summary" role="alert"></p>', js_on_load=None)
                self.brief = gr.HTML("", elem_id="sw-brief", js_on_load=None)
            with gr.Column(scale=6, min_width=320):
                self.live = self._fragment("live")

    def _settings_tab(self) -> None:
        words, widget = self.words, self.widgets
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320, elem_classes="sw-left"):
                with self._group("section.model"):
                    widget("model", elem_classes="sw-model")
                    self.model_info = self._fragment("model")
                with self._group("section.attention"):
                    widget("attention")
                    with gr.Row():
                        widget("attention_ends", min_width=300)
                        widget("attention_ends.first", min_width=100)
                        widget("attention_ends.last", min_width=100)
                    with gr.Row():
                        widget("attention_keep_layers", min_width=140)
                        widget("sparsity", min_width=140)
                self._weights()
                with self._group("section.lora"), gr.Row():
                    widget("lora", min_width=220)
                    widget("lora.strength", min_width=140)
                with self._group("section.sampling"):
                    self._rows(("scheduler", "shift", "cfg", "cfg_2", "boundary", "fps"))
                with self._group("section.more"):
                    self._rows(("device", "dtype", "output"))
                    self._rows(("strict", "emulate", "metadata", "report"))
                self.reset = gr.Button(words("button.reset"), size="sm")
            with gr.Column(scale=5, min_width=320):
                self._title("section.plan")
                self.plan = gr.HTML("", elem_id="sw-plan", js_on_load=None)
                self._title("section.modes")
                self.modes = gr.HTML("", elem_id="sw-modes", js_on_load=None)
                self._title("section.quantizations")
                self.weights = gr.HTML("", elem_id="sw-weights", js_on_load=None)
                self._title("section.from_file")
                gr.HTML(
                    render("intro", words, text=words("section.from_file_info")), js_on_load=None
                )
                self.from_file = gr.File(
                    label=words("section.from_file"), file_types=[".mp4"], height=140
                )

    def _weights(self) -> None:
        with self._group("section.weights"):
            self._rows(("quantization", "block_swap", "cache"))

    def _rows(self, names: tuple[str, ...], across: int = 3, min_width: int = 140) -> None:
        for start in range(0, len(names), across):
            with gr.Row():
                for name in names[start : start + across]:
                    self.widgets(name, min_width=min_width)

    def _compare_tab(self) -> None:
        words = self.words
        self._intro("compare.intro")
        with gr.Row(equal_height=False):
            for number in range(1, SLOTS + 1):
                with gr.Group(elem_classes="sw-slot"):
                    self.slots.append(self._slot(number))
        self.run_compare = gr.Button(
            words("button.compare"), variant="primary", elem_id="sw-compare-go"
        )
        gr.HTML('<p id="sw-compare-summary" role="alert"></p>', js_on_load=None)
        self.compared = self._fragment("compare")

    def _slot(self, number: int) -> dict[str, Any]:
        words = self.words
        modes = [(words("compare.unused"), ""), *((name, name) for name in (*MODES, AUTO))]
        first = ("sdpa", "sageattn_3_fp8", "", "")[number - 1]
        title = words("compare.setting", number=number)
        slot: dict[str, Any] = {
            "attention": gr.Dropdown(
                modes,
                value=first,
                label=f"{title} · {words('field.attention')}",
                elem_id=f"slot-{number}",
            )
        }
        if "quantization" in field_types():
            made = Widgets(words)(
                "quantization",
                elem_id=f"slot-{number}-quantization",
                info=None,
                label=f"{title} · {words('field.quantization')}",
            )
            slot["quantization"] = made
        slot["steps"] = gr.Textbox(
            label=f"{title} · {words('field.steps')}", elem_id=f"slot-{number}-steps"
        )
        return slot

    def _diagnose_tab(self) -> None:
        words = self.words
        self._intro("doctor.intro")
        self.examine = gr.Button(words("button.diagnose"), variant="primary", elem_id="sw-examine")
        self.diagnosis = gr.HTML("", elem_id="sw-diagnosis", js_on_load=static("copy.js"))

    def _fragment(self, kind: str) -> gr.HTML:
        source, down = f"/fragment/{self.words.language}/{kind}", self.words("app.offline")
        return gr.HTML(
            f'<div class="sw-fragment" data-src="{source}" data-down="{down}"></div>',
            elem_id=f"sw-{kind}",
            js_on_load=static("fragment.js"),
        )

    def _title(self, key: str) -> None:
        gr.HTML(f"<h2 class='sw-title'>{self.words(key)}</h2>", js_on_load=None)

    def _intro(self, key: str) -> None:
        gr.HTML(render("intro", self.words, text=self.words(key)), js_on_load=None)

    @contextmanager
    def _group(self, key: str) -> Iterator[None]:
        self._title(key)
        with gr.Group(elem_classes="sw-group"):
            yield

    def _wire(self, page: gr.Blocks) -> None:
        made, handlers = self.widgets.made, self.handlers
        every = set(made.values())
        told = [self.plan, self.brief, self.modes, self.weights, self.answer]
        shown = [*told, *made.values()]

        def changed(data: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
            return self._told(handlers.changed(self._named(data), request))

        def opened(request: gr.Request) -> dict[Any, Any]:
            kept = {"lora": [], "model": DEMO, **handlers.opened(request)}
            # Nothing else is sent: a visitor may have begun to type.
            placed = self._placed(kept)
            values = {name: widget.value for name, widget in made.items()} | kept
            for widget, update in self._told(handlers.changed(values, request)).items():
                if widget in placed:
                    update |= {"value": placed[widget]}
                placed[widget] = update
            return placed

        page.load(opened, None, shown, **_EVENT)
        gr.on(
            [widget.change for widget in every],
            changed,
            every,
            shown,
            trigger_mode="always_last",
            **_EVENT,
        )
        self._wire_buttons(every)

    def _told(self, answer: Answer) -> dict[Any, Any]:
        """What the page shows of an answer."""
        updates = {self.plan: answer.plan, self.brief: answer.brief}
        updates |= {self.answer: answer.refusal} | self._placed(answer.hints)
        if answer.modes is not None:
            updates |= {self.modes: answer.modes, self.weights: answer.weights or ""}
        return updates

    def _wire_buttons(self, every: set[Any]) -> None:
        handlers = self.handlers

        def generate(data: dict[Any, Any], request: gr.Request) -> str:
            return handlers.generate(self._named(data), request)

        def compare(data: dict[Any, Any], request: gr.Request) -> str:
            slots: list[Mapping[str, Any]] = [self._slot_values(slot, data) for slot in self.slots]
            return handlers.compare(self._named(data), slots, request)

        def used(path: str | None) -> dict[Any, Any]:
            return self._placed(handlers.of_file(path), keep=True)

        def fresh() -> dict[Any, Any]:
            made = self.widgets.made
            return {widget: widget.value for name, widget in made.items() if name != "prompt"}

        inputs = every | {widget for slot in self.slots for widget in slot.values()}
        self.go.click(generate, every, self.answer, **_EVENT)
        self.run_compare.click(compare, inputs, self.answer, **_EVENT)
        self.from_file.upload(used, self.from_file, list(every), **_EVENT)
        self.reset.click(fresh, None, list(every), **_EVENT)
        self.examine.click(lambda: self._working(), None, self.diagnosis, **_EVENT).then(
            handlers.diagnose, None, self.diagnosis, **_EVENT
        )
        for board in (self.live, self.library, self.compared, self.model_info):
            board.click(self._acted, None, [self.tabs, *every], **_EVENT)

    def _acted(self, event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        told = {name: getattr(event, name, None) for name in ("act", "job", "where")}
        values = self.handlers.act(told, request)
        updates = self._placed(values, keep=True)
        return updates | {self.tabs: gr.update(selected="generate") if values else gr.skip()}

    def _working(self) -> str:
        return render("intro", self.words, text=self.words("doctor.working"))

    def _named(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        return {name: data[widget] for name, widget in self.widgets.made.items()}

    def _slot_values(self, slot: Mapping[str, Any], data: Mapping[Any, Any]) -> dict[str, Any]:
        """What a slot changes, as JSON of a request; nothing if it names no mode."""
        if not data[slot["attention"]]:
            return {}
        values = {name: data[widget] for name, widget in slot.items() if data[widget]}
        return {name: int(x) if isinstance(x, float) else x for name, x in values.items()}

    def _placed(self, values: Mapping[str, Any], *, keep: bool = False) -> dict[Any, Any]:
        """Values by name → by widget. With ``keep`` there is always one, as gradio wants it."""
        made = self.widgets.made
        lists = choices_now(self.words, values) if "lora" in values else {}
        placed = {
            made[name]: gr.update(choices=lists[name], value=value) if name in lists else value
            for name, value in values.items()
            if name in made
        }
        return placed or ({made["prompt"]: gr.skip()} if keep else {})
