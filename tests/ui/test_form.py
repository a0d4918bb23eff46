"""Widgets and fields are the same set, and mean the same."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sagewan.checkpoint.find import demo_folder
from sagewan.checkpoint.places import models_folder
from sagewan.errors import RequestError
from sagewan.jobs.queue import Queue
from sagewan.plan.modes import fitting_preset
from sagewan.plan.request import Ends, Request
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache
from sagewan.ui import uploads
from sagewan.ui.door import owner_of
from sagewan.ui.form import PARTS, names, request_of, values_of
from sagewan.ui.uploads import kept_picture, sweep, uploads_folder
from sagewan.ui.views import fallback_notes, left_out
from sagewan.ui.words import Words

# gradio leaves an event loop open for each page it makes: in a process of its own.
PAGES = """
import json, sys
from sagewan.ui.quick_gradio import import_gradio
import_gradio()
from sagewan.ui.page import build_page
from sagewan.ui.widgets import _MAKE
from sagewan.ui.words import LANGUAGES
ids = [[getattr(b, "elem_id", None) for b in build_page(l).blocks.values()] for l in LANGUAGES]
torch = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
print(json.dumps({"ids": ids, "made": list(_MAKE), "torch": torch}))
"""


def test_there_is_one_widget_for_each_field_and_no_torch_in_the_page() -> None:
    command = [sys.executable, "-c", PAGES]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    told = json.loads(out)
    assert told["torch"] == []
    assert set(told["made"]) >= set(names())
    for ids in told["ids"]:
        on_the_page = {name for name in names() if f"field-{name.replace('.', '-')}" in ids}
        assert on_the_page == set(names())
    assert {name.partition(".")[0] for name in names()} == {f.name for f in fields(Request)}


EXAMPLES: dict[str, tuple[dict[str, Any], Any]] = {
    "negative": ({"negative": "blur"}, "blur"),
    "model": ({"model": "wan2.1-t2v-14b"}, "wan2.1-t2v-14b"),
    "output": ({"output": "my ../../clip"}, Path("my-clip.mp4")),
    "preset": ({"preset": "balanced"}, "balanced"),
    "attention": ({"attention": "sdpa"}, "sdpa"),
    "attention_ends": (
        {"attention": "sdpa", "attention_ends": "sageattn", "attention_ends.first": "2"},
        Ends(mode="sageattn", first=2, last=0),
    ),
    "steps": ({"steps": " 12 "}, 12),
    "cfg": ({"cfg": "4.5"}, 4.5),
    "cfg_2": ({"cfg_2": "3"}, 3.0),
    "boundary": ({"boundary": "0.9"}, 0.9),
    "shift": ({"shift": "8"}, 8.0),
    "scheduler": ({"scheduler": "lcm"}, "lcm"),
    "quantization": ({"quantization": "fp8_scaled"}, "fp8_scaled"),
    "sparsity": ({"sparsity": "sta:0.5"}, Sparsity(kind="sta", share=0.5)),
    "cache": ({"cache": "easy:0.1"}, StepCache(method="easy", threshold=0.1)),
    "seed": ({"seed": str(2**60 + 1)}, 2**60 + 1),
    "size": ({"size": "1280x720"}, (1280, 720)),
    "frames": ({"frames": "81"}, 81),
    "fps": ({"fps": "24"}, 24),
    "device": ({"device": "cuda:1"}, "cuda:1"),
    "dtype": ({"dtype": "float16"}, "float16"),
    "strict": ({"strict": True}, True),
    "emulate": ({"emulate": True}, True),
    "metadata": ({"metadata": False}, False),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_widget_reaches_its_field_and_comes_back(name: str) -> None:
    values, expected = EXAMPLES[name]
    request = request_of({"prompt": "a ball", **values})
    assert getattr(request, name) == expected
    assert getattr(request_of(values_of(request)), name) == expected


def test_no_strength_and_no_lora_is_left_out_in_silence(own_folders: None) -> None:
    folder = models_folder() / "loras"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").touch()
    values = {"prompt": "a ball", "lora": ["a.safetensors", "b.safetensors"]}
    request = request_of({**values, "lora.strength": "0.5"})
    assert [lora.strength for lora in request.lora] == [0.5, 1.0]
    with pytest.raises(RequestError, match="lora has 3 strengths for 2 files"):
        request_of({**values, "lora.strength": "1, 1, 0.5"})
    (folder / "b.safetensors").unlink()
    assert values_of(request)["lora"] == ["a.safetensors", "b.safetensors"]
    with pytest.raises(RequestError, match=r"lora=b.safetensors is not in the folder"):
        request_of({"prompt": "a ball", **values_of(request)})


def test_an_empty_form_is_the_default_request() -> None:
    empty = {name: "" for name in names() if name.partition(".")[0] not in ("prompt", "metadata")}
    assert request_of({**empty, "prompt": "a ball"}) == Request(prompt="a ball")


WRONG = {
    "prompt": {"prompt": "  "},
    "negative": {"negative": "\ud800"},
    "preset": {"preset": "best"},
    "attention": {"attention": "sageatn"},
    "attention_ends": {"attention": "sdpa", "attention_ends": "sdpa", "attention_ends.last": "x"},
    "attention_keep_layers": {"attention_keep_layers": "first"},
    "sparsity": {"sparsity": "0.75"},
    "cache": {"cache": "easy"},
    "steps": {"steps": "2.5"},
    "cfg": {"cfg": "high"},
    "cfg_2": {"cfg_2": "-1"},
    "boundary": {"boundary": "2"},
    "shift": {"shift": "0"},
    "scheduler": {"scheduler": "ddim"},
    "quantization": {"quantization": "int3"},
    "seed": {"seed": "-3"},
    "size": {"size": "big"},
    "frames": {"frames": "6"},
    "fps": {"fps": "0"},
    "dtype": {"dtype": "int8"},
    "lora": {"lora": ["gone.safetensors"]},
    "model": {"model": "gone.safetensors"},
    "image": {"image": "/etc/passwd"},
    "last_image": {"last_image": "/etc/passwd"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_refusal_begins_with_its_field(name: str) -> None:
    from sagewan.ui.handlers import refusals

    with pytest.raises(RequestError) as caught:
        request_of({"prompt": "a ball", **WRONG[name]})
    answer = json.loads(refusals(caught.value, Words("zh")))
    assert answer["field"] == name
    assert any("\u4e00" <= letter <= "\u9fff" for letter in answer["text"])


def upload(name: str, picture: Image.Image | None = None, data: bytes = b"") -> Path:
    path = uploads_folder() / "abc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture is None:
        path.write_bytes(data)
    else:
        exif = Image.Exif()
        exif[0x010E] = "a secret place"
        picture.save(path, exif=exif)
    return path


def test_a_picture_is_written_anew_without_what_it_carried() -> None:
    path = upload("a.jpg", Image.new("RGB", (64, 48), "red"))
    assert b"a secret place" in path.read_bytes()
    kept = kept_picture(path, "image")
    assert kept.parent == uploads_folder() / "kept"
    assert b"a secret place" not in kept.read_bytes()
    with Image.open(kept) as image:
        assert (image.format, image.size) == ("PNG", (64, 48))
    assert kept_picture(kept, "image") == kept


def test_of_an_animation_only_the_first_frame_is_decoded() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    path = uploads_folder() / "a.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(kept_picture(path, "image")) as image:
        assert getattr(image, "n_frames", 1) == 1
        assert image.getpixel((5, 5)) == (254, 0, 0) or image.getpixel((5, 5)) == (255, 0, 0)


def test_what_is_no_picture_too_large_or_from_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"image=a\.png is not a picture"):
        kept_picture(upload("a.png", data=b"<svg onload=alert(1)>"), "image")
    bomb = upload("bomb.png", Image.new("1", (10000, 9000)))
    with pytest.raises(RequestError, match="million pixels"):
        kept_picture(bomb, "image")
    monkeypatch.setattr(uploads, "MAX_BYTES", 10)
    with pytest.raises(RequestError, match="more than 0 MB"):
        kept_picture(bomb, "image")
    mine = tmp_path / "mine.png"
    Image.new("RGB", (32, 32)).save(mine)
    for path in (mine, uploads_folder() / ".." / ".." / "mine.png", Path("/etc/passwd")):
        with pytest.raises(RequestError, match="choose the picture again"):
            kept_picture(path, "image")


def test_a_model_is_named_by_the_server_not_by_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    assert request_of({"prompt": "x", "model": "mine"}).model == str(tmp_path / "mine")
    for path in (str(tmp_path / "mine"), "../mine", "/etc"):
        with pytest.raises(RequestError, match="model="):
            request_of({"prompt": "x", "model": path})


def test_a_lora_may_be_for_one_expert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path))
    file = tmp_path / "loras" / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"")
    chosen = ["high=a.safetensors", "low=a.safetensors", "a.safetensors"]
    request = request_of({"prompt": "x", "lora": chosen, "lora.strength": "1, 0.5"})
    assert [str(one) for one in request.lora] == [f"high={file}:1", f"low={file}:0.5", f"{file}:1"]
    assert values_of(request)["lora"] == chosen
    assert request_of(values_of(request)).lora == request.lora
    with pytest.raises(RequestError, match=r"lora=low=b\.safetensors is not in the folder"):
        request_of({"prompt": "x", "lora": ["low=b.safetensors"]})


def test_parts_belong_to_fields() -> None:
    assert set(PARTS) <= {field.name for field in fields(Request)}
    assert owner_of({"x-sagewan-owner": "me"}) == "me"


@pytest.mark.parametrize(
    ("gib", "preset"),
    [(6, "low-vram"), (8, "low-vram"), (11.9, "balanced"), (15.6, "quality"), (80, "quality")],
)
def test_the_preset_for_a_card(gib: float, preset: str) -> None:
    assert fitting_preset(int(gib * 2**30)) == preset


def test_a_chain_of_fallbacks_with_one_reason_is_one_sentence() -> None:
    steps = [
        {"from": "a", "to": "b", "why": "needs an NVIDIA GPU, and X is not one"},
        {"from": "b", "to": "c", "why": "needs an NVIDIA GPU, and X is not one"},
        {"from": "c", "to": "d", "why": "its result stopped being finite at step 3"},
    ]
    first, second = fallback_notes(steps, Words("en"))
    assert first == "a gave way to c: needs an NVIDIA GPU, and X is not one"
    assert second == "c gave way to d: its result stopped being finite at step 3"


def test_what_was_left_out_stands_under_the_video_in_both_languages() -> None:
    report = {
        "attention": {"sparsity": {"requested": "radial:0.75", "skipped": 0.49}},
        "cache": {"requested": "easy:0.05", "reused": 10, "forwards": 32, "steps": [6, 8]},
    }
    assert list(left_out(report, Words("en"))) == [
        "Sparsity radial:0.75: 49% of the blocks of keys left out",
        "Step cache easy:0.05: 10 of 32 forward passes reused",
    ]
    assert "49%" in next(left_out(report, Words("zh")))
    assert list(left_out({"attention": {"sparsity": None}, "cache": None}, Words("en"))) == []
    assert list(left_out({}, Words("en"))) == []


def test_uploads_that_nothing_names_are_removed_when_they_are_old(queue: Queue) -> None:
    old = time.time() - 2 * 24 * 3600
    kept = uploads_folder() / "kept"
    kept.mkdir(parents=True)
    of_job, of_form, forgotten, fresh = (kept / f"{name}.png" for name in "abcd")
    sent = uploads_folder() / "hash" / "sent.png"
    sent.parent.mkdir()
    for path in (of_job, of_form, forgotten, fresh, sent):
        path.write_bytes(b"picture")
        if path != fresh:
            os.utime(path, (old, old))
    job = queue.enqueue(Request(prompt="x", image=of_job), "me")
    queue.set_draft("you", {"prompt": str(fresh), "last_image": str(of_form), "lora": ["a"]})
    assert sweep(queue) == 2
    assert sorted(path.name for path in kept.iterdir()) == ["a.png", "b.png", "d.png"]
    assert not sent.exists()
    queue.cancel(job)
    queue.remove(job)
    # What gradio made for the one that was sent goes with it, once nothing changed there for long.
    os.utime(sent.parent, (old, old))
    assert sweep(queue) == 1
    assert not of_job.exists()
    assert not sent.parent.exists()
    for path in kept.iterdir():
        path.unlink()
    os.utime(kept, (old, old))
    assert sweep(queue) == 0
    assert kept.exists()


@pytest.mark.parametrize("error", [OSError("disk full"), sqlite3.OperationalError("locked")])
def test_a_look_at_the_uploads_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setenv("SAGEWAN_DATA", str(tmp_path))
    stopping, looks = threading.Event(), []

    def look(_: Queue) -> int:
        looks.append(1)
        if len(looks) == 1:
            raise error
        stopping.set()
        return 0

    monkeypatch.setattr(uploads, "sweep", look)
    monkeypatch.setattr(uploads, "_FIRST_SWEEP", 0.0)
    monkeypatch.setattr(uploads, "_SWEEPS", 0.0)
    uploads.keep_swept(stopping)
    assert len(looks) == 2


def test_a_picture_that_is_sent_again_counts_as_new(queue: Queue) -> None:
    path = uploads_folder() / "hash" / "sent.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(path)
    kept = kept_picture(path, "image")
    for again in (path, kept):
        os.utime(kept, (0, 0))
        assert kept_picture(again, "image") == kept
        assert sweep(queue) == 0


def test_a_file_with_the_name_of_a_lora_of_the_demo_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = next((demo_folder() / "loras").glob("*.safetensors"))
    monkeypatch.setenv("SAGEWAN_MODELS", str(tmp_path))
    file = tmp_path / "loras" / own.name
    file.parent.mkdir()
    file.write_bytes(b"")
    chosen = [own.name, f"loras/{own.name}", f"high=loras/{own.name}"]
    request = request_of({"prompt": "x", "lora": chosen})
    assert [one.path for one in request.lora] == [own, file, file]
    assert values_of(request)["lora"] == chosen
