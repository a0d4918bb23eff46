"""What the page's events do, without a page."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sagewan.checkpoint.inspection import Inspection
from sagewan.jobs.queue import Queue
from sagewan.jobs.states import State
from sagewan.pipeline.draft import ANY_PROMPT
from sagewan.plan.hardware import Device
from sagewan.plan.request import Request
from sagewan.ui.boards import BOARDS
from sagewan.ui.handlers import Handlers
from sagewan.ui.planned import modes_here, plan_view, preset_here, quantizations_here
from sagewan.ui.views import current
from sagewan.ui.words import LANGUAGES, Words
from tests.machines import machine
from tests.ui.conftest import finished

REQUEST = Request(prompt="a red ball", seed=1)


def visitor(name: str) -> Any:
    return SimpleNamespace(headers={"x-sagewan-owner": name})


ME, YOU = visitor("me"), visitor("you")


@pytest.fixture
def handlers(queue: Queue) -> Handlers:
    return Handlers(Words("en"))


def test_generate_queues_a_job_of_the_visitor_with_a_seed(handlers: Handlers, queue: Queue) -> None:
    answer = json.loads(handlers.generate({"prompt": "a red ball", "output": "../x"}, ME))
    assert "queued" in answer
    (job,) = queue.of("me")
    assert job.request["seed"] is not None
    assert Path(job.request["output"]).name == "x.mp4"
    assert queue.of("you") == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a zebra"}, "prompt"),
        ({"prompt": "a red ball", "frames": "6"}, "frames"),
        ({"prompt": "a red ball", "model": "wan2.1-t2v-14b"}, "model"),
        ({"prompt": "a red ball", "attention_keep_layers": "99"}, "attention_ends"),
    ],
)
def test_what_cannot_be_made_is_not_queued(
    handlers: Handlers, queue: Queue, values: dict[str, Any], field: str
) -> None:
    answer = json.loads(handlers.generate(values, ME))
    assert (answer["field"] in (field, "attention_keep_layers"), "queued" in answer) == (
        True,
        False,
    )
    assert queue.of(None) == []


def test_a_comparison_is_queued_whole_or_refused(handlers: Handlers, queue: Queue) -> None:
    values = {"prompt": "a red ball", "steps": "2"}
    one = [{"attention": "sdpa"}]
    assert "2 to 4 settings" in json.loads(handlers.compare(values, one, ME))["text"]
    wrong = [*one, {"attention": "nonsense"}]
    assert json.loads(handlers.compare(values, wrong, ME))["field"] == "attention"
    assert queue.of(None) == []
    handlers.compare(values, [*one, {}, {"attention": "sageattn", "steps": 3}], ME)
    (job,) = queue.of("me")
    assert job.variants == ({"attention": "sdpa"}, {"attention": "sageattn", "steps": 3})


def test_a_visitor_acts_on_jobs_of_their_own_only(
    handlers: Handlers, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("sagewan.ui.handlers.gr.Warning", warned.append)
    job = finished(queue, REQUEST, "me")
    for act in ("cancel", "repeat", "delete", "use"):
        assert handlers.act({"act": act, "job": str(job)}, YOU) == {}
    assert len(warned) == 4
    for odd in ({"act": "delete"}, {"act": "delete", "job": "1; DROP TABLE jobs"}, {}):
        assert handlers.act(odd, ME) == {}
    assert handlers.act({"act": "use", "job": str(job)}, ME)["prompt"] == "a red ball"
    handlers.act({"act": "repeat", "job": str(job)}, ME)
    (again,) = queue.of("me", State.QUEUED)
    assert again.request["seed"] != 1
    handlers.act({"act": "cancel", "job": str(again.id)}, ME)
    handlers.act({"act": "delete", "job": str(again.id)}, ME)
    handlers.act({"act": "delete", "job": str(job)}, ME)
    assert queue.of("me") == []


def test_what_was_typed_is_kept_even_if_it_is_wrong(handlers: Handlers) -> None:
    answer = handlers.changed({"prompt": "a red ball", "frames": "6"}, ME)
    assert json.loads(answer.refusal)["field"] == "frames"
    assert handlers.opened(ME) == {"prompt": "a red ball", "frames": "6"}
    assert handlers.opened(YOU) == {}


def test_a_file_without_settings_is_said(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("sagewan.ui.handlers.gr.Warning", warned.append)
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    assert handlers.of_file(str(path)) == {}
    assert handlers.of_file(None) == {}
    assert warned == ["from=clip.mp4 is not a video; name an mp4 that sagewan made"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("gpu", ["3080", "4090", "H100", "5090"])
def test_every_card_is_told_what_each_mode_would_do(language: str, gpu: str) -> None:
    hardware = machine(gpu, triton="3.7.1", torch="2.13.0")
    words = Words(language)
    request = Request(prompt=ANY_PROMPT, preset="low-vram", model="wan2.1-t2v-14b")
    modes = {mode.name: mode for mode in modes_here(request, hardware, words)}
    assert modes["sdpa"].itself
    assert modes["sageattn_3"].itself
    assert modes["sageattn_3_fp8"].itself is (gpu != "3080")
    assert modes["sageattn_3_fp4"].itself is (gpu == "5090")
    for mode in modes.values():
        assert mode.itself is not bool(mode.why)
    if gpu == "4090" and language == "zh":
        assert "或更新（Blackwell）" in (modes["sageattn_3_fp4"].why or "")
    kinds = {kind.name: kind for kind in quantizations_here(request, hardware, words)}
    assert kinds["fp8_scaled"].itself is (gpu != "3080")
    assert preset_here(hardware) == ("low-vram" if gpu == "3080" else "quality")


def test_without_a_card_no_preset_is_marked_and_a_plan_can_be_shown() -> None:
    from sagewan.pipeline.draft import draft_plan

    assert preset_here(machine()) is None
    view = plan_view(draft_plan(Request(prompt="a red ball"), machine()), Words("zh"))
    assert view.mode == "sdpa"
    assert view.fits


@pytest.mark.parametrize(("gpu", "fits"), [("3080", True), ("H100", True)])
def test_the_memory_of_a_card_is_a_bar_in_words(gpu: str, fits: bool) -> None:
    from sagewan.pipeline.draft import draft_plan

    request = Request(prompt=ANY_PROMPT, preset="low-vram", model="wan2.1-t2v-14b")
    hardware = replace(machine(gpu, triton="3.7.1"), cpu=Device(name="cpu", memory_free=64 << 30))
    view = plan_view(draft_plan(request, hardware), Words("zh"))
    assert view.fits is fits
    assert 0 < sum(share for *_, share in view.parts) <= 1
    assert "GiB" in view.memory
    assert not re.search("[a-z]{4,}", view.memory.replace("transformer", "").replace("NVIDIA", ""))
    assert any("块中有" in value for _, value in view.lines)


def test_a_comparison_does_not_hide_the_last_video(handlers: Handlers, queue: Queue) -> None:
    words = Words("en")
    job = finished(queue, REQUEST, "me")
    other = queue.enqueue(REQUEST, "me", [{"attention": "sdpa"}, {"attention": "sageattn"}])
    for state in (None, State.RUNNING, State.CANCELLED):
        if state is State.RUNNING:
            queue.start(other)
        elif state:
            queue.finish(other, state)
        shown = current(queue, "me", words)
        assert shown is not None
        assert shown.id == job
    assert current(queue, "you", words) is None
    waiting = queue.enqueue(REQUEST, "me")
    shown = current(queue, "me", words)
    assert shown is not None
    assert (shown.id, shown.place) == (waiting, 1)


def test_what_a_model_is_stands_there_in_the_visitors_language(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Inspection(path="x", kind="text_encoder + vae", problems=["it is wet"])
    monkeypatch.setattr("sagewan.ui.boards.model_facts", lambda _: (found.facts(), ()))
    assert "text encoder + vae · 0 MB · with problems" in BOARDS["model"](queue, "me", Words("en"))
    assert "文本编码器 + VAE · 0 MB · 有问题" in BOARDS["model"](queue, "me", Words("zh"))
