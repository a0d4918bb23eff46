import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sagewan.memory.placement import Place
from sagewan.memory.tensors import tensors_of
from sagewan.pipeline.loaded import Part
from sagewan.pipeline.run import generate
from sagewan.pipeline.session import Session
from sagewan.plan.request import Request
from tests.pipeline.runs import picture
from tests.shrunken import NEGATIVE, PROMPT

Folder = Callable[[str], Path]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the parts, as they are loaded."""
    names: list[str] = []
    enter = Part._enter

    def noted(self: Part, place: Place) -> object:
        if self._module is None:
            names.append(self.name)
        return enter(self, place)

    monkeypatch.setattr(Part, "_enter", noted)
    return names


def request(folder: Path, output: Path, **changes: object) -> Request:
    settings: dict[str, object] = {
        "prompt": PROMPT,
        "negative": NEGATIVE,
        "model": str(folder),
        "attention": "sdpa",
        "steps": 2,
        "cfg": 4.0,
        "seed": 7,
        "size": (64, 64),
        "frames": 5,
        "output": output,
    }
    return Request(**settings | changes)  # type: ignore[arg-type]


def sha(result: object) -> str:
    return str(result.report["output"]["sha256"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b", "wan2.2-t2v-a14b"])
def test_a_second_request_makes_its_video_without_loading(
    name: str, shrunken_folder: Folder, tmp_path: Path, loads: list[str]
) -> None:
    folder = shrunken_folder(name)
    changes = {"image": picture(tmp_path / "a.png", 1)} if "i2v" in name else {}
    alone = [
        sha(generate(request(folder, tmp_path / "x.mp4", seed=seed, **changes))) for seed in (7, 8)
    ]
    loads.clear()
    with Session() as session:
        kept = [
            sha(session.generate(request(folder, tmp_path / "x.mp4", seed=seed, **changes)))
            for seed in (7, 8, 7)
        ]
    assert kept == [alone[0], alone[1], alone[0]]
    assert len(loads) == len(set(loads)) > 0


def test_only_what_changed_is_loaded_anew(
    shrunken_folder: Folder, tmp_path: Path, loads: list[str]
) -> None:
    folder, other = shrunken_folder("wan2.1-t2v-1.3b"), shrunken_folder("wan2.2-ti2v-5b")
    video = tmp_path / "x.mp4"
    everything = ["text_encoder", "transformer", "vae"]
    with Session() as session:
        session.generate(request(folder, video))
        assert loads == everything
        loads.clear()
        session.generate(request(folder, video, attention="sageattn_3", emulate=True))
        session.generate(request(folder, video, prompt=NEGATIVE, size=(80, 64), steps=1))
        assert loads == []
        session.generate(request(other, video))
        assert loads == everything
        loads.clear()
        session.generate(request(folder, video, dtype="bfloat16"))
        assert loads == everything


def test_a_session_goes_on_after_an_error(
    shrunken_folder: Folder, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagewan.errors import UnsupportedError
    from sagewan.pipeline import denoise

    folder, video = shrunken_folder("wan2.1-t2v-1.3b"), tmp_path / "x.mp4"

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with Session() as session:
        expected = sha(session.generate(request(folder, video)))
        with monkeypatch.context() as patched:
            patched.setattr(denoise._Forward, "guided", fail)
            with pytest.raises(UnsupportedError, match="out of memory"):
                session.generate(request(folder, video))
        loads.clear()
        assert sha(session.generate(request(folder, video))) == expected
        assert loads == []


def test_a_closed_session_holds_nothing(shrunken_folder: Folder, tmp_path: Path) -> None:
    session = Session()
    session.generate(request(shrunken_folder("wan2.1-t2v-1.3b"), tmp_path / "x.mp4"))
    modules = [part._module for part in session._parts.values()]
    session.close()
    assert {t.device.type for module in modules for t in tensors_of(module)} == {"meta"}
    gc.collect()
    assert session._parts == {}


def test_another_place_leaves_the_weights_as_they_are(shrunken_folder: Folder) -> None:
    from sagewan.attention.launch import Launcher
    from sagewan.pipeline.build import build
    from tests.pipeline.runs import plan_for

    session = Session()
    plan = plan_for(shrunken_folder("wan2.1-t2v-1.3b"))
    part = build(plan, Launcher(), session).transformers[0]
    with part.on("cpu") as module:
        saved = {name: value.clone() for name, value in module.state_dict().items()}
    for swapped in (2, 1, 0):
        with part.on(Place(device="cpu", swapped=swapped, pin_budget=1 << 30)):
            assert part.placement is not None
            assert (part.placement.pinned_bytes > 0) == (swapped > 0)
        found = module.state_dict()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    session.close()


def test_another_pin_budget_moves_nothing(shrunken_folder: Folder) -> None:
    from sagewan.attention.launch import Launcher
    from sagewan.pipeline.build import build
    from tests.pipeline.runs import plan_for

    with Session() as session:
        part = build(plan_for(shrunken_folder("wan2.1-t2v-1.3b")), Launcher(), session)
        transformer = part.transformers[0]
        placements = []
        for budget in (1 << 30, 1 << 29):
            with transformer.on(Place(device="cpu", swapped=2, pin_budget=budget), stays=True):
                placements.append(transformer.placement)
        assert placements[0] is placements[1]


def test_what_two_experts_pin_is_one_budget(shrunken_folder: Folder) -> None:
    from sagewan.attention.launch import Launcher
    from sagewan.pipeline.build import build
    from tests.pipeline.runs import plan_for

    with Session() as session:
        components = build(plan_for(shrunken_folder("wan2.2-t2v-a14b")), Launcher(), session)
        first, second = components.transformers
        with first.on(Place(device="cpu", swapped=2, pin_budget=1 << 30)):
            pass
        both = Place(device="cpu", swapped=2, pin_budget=first.pinned_bytes + 1000)
        with second.on(both):
            pass
        assert first.pinned_bytes > second.pinned_bytes
        assert first.pinned_bytes + second.pinned_bytes <= both.pin_budget
        assert second.unpinned_blocks == 2


def test_encoders_find_the_device_empty(
    shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the transformer stayed after the video before."""
    from sagewan.plan import plan as module

    decide = module.plan_memory
    monkeypatch.setattr(module, "plan_memory", lambda *a: replace(decide(*a), stays=True))
    entered: list[list[str]] = []
    with Session() as session:
        enter = Part._enter

        def noted(self: Part, place: Place) -> object:
            on = [p.name for p in session._parts.values() if p.placement and p.placement.entered]
            entered.append([self.name, *on])
            return enter(self, place)

        monkeypatch.setattr(Part, "_enter", noted)
        for prompt in (PROMPT, NEGATIVE):
            session.generate(
                request(shrunken_folder("wan2.1-t2v-1.3b"), tmp_path / "x.mp4", prompt=prompt)
            )
    texts = [others for name, *others in entered if name == "text_encoder"]
    assert texts == [[], []]
    assert ["vae", "transformer"] in entered
