"""Memory that runs out: the work is made again in less, once, said, and nothing is left behind."""

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.attention.launch import Launcher
from sagewan.errors import UnsupportedError
from sagewan.memory.pinned import pinned_empty
from sagewan.memory.placement import Place
from sagewan.memory.tensors import tensors_of
from sagewan.model.block import Block
from sagewan.pipeline import conditions, decode, denoise
from sagewan.pipeline.build import build
from sagewan.pipeline.loaded import Part
from sagewan.pipeline.recover import out_of_memory
from sagewan.pipeline.run import generate
from sagewan.pipeline.session import Session
from sagewan.plan.budget.transformer import Chunks
from sagewan.plan.evidence import Evidence, Shortage
from sagewan.plan.hardware import GIB
from sagewan.plan.memory import MemoryPlan
from sagewan.plan.plan import Plan, make_plan
from sagewan.plan.request import Request
from tests.machines import WAN_14B, machine
from tests.pipeline.runs import difference, latents_of, plan_for
from tests.pipeline.test_session import request

Folder = Callable[[str], Path]
T2V = "wan2.1-t2v-1.3b"
PLENTY = 1 << 30


def planned(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, memory=replace(plan.memory, **changes))


@pytest.fixture
def taking_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's plan that takes less after a shortage, as a GPU's does."""
    from sagewan.plan import plan as module

    decide = module.plan_memory

    def less(needs: Any, hardware: Any, shortages: Any = ()) -> MemoryPlan:
        memory = decide(needs, hardware)
        if shortages:
            tile = (3, 3)
            memory = replace(
                memory,
                block_swap=2,
                pin_budget=PLENTY,
                text_swap=2,
                text_pin_budget=PLENTY,
                chunks=Chunks(8, 1),
                encode_tile=tile,
                decode_tile=tile,
                room=memory.room - 1,
            )
        return memory

    monkeypatch.setattr(module, "plan_memory", less)


class Failing:
    """A function that runs out of memory at one of its calls (or at all from then on)."""

    def __init__(self, function: Any, at: int, *, always: bool = False) -> None:
        self.function, self.at, self.always = function, at, always
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at or (self.always and self.calls > self.at):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


# Where an allocation fails: the object, its attribute, and the call.
POINTS: dict[str, tuple[Any, str, int]] = {
    "loading the text encoder": (Part, "_place", 1),
    "the first text": (conditions, "encode_text", 1),
    "the second text": (conditions, "encode_text", 2),
    "loading the transformer": (Part, "_place", 2),
    "the first block of the first step": (Block, "_attend_to_self", 1),
    "attention to the text": (Block, "_attend_to_text", 2),
    "the feed-forward of the second step": (Block, "_feed_forward", 6),
    "guidance": (denoise._Forward, "_predict", 2),
    "loading the VAE": (Part, "_place", 3),
    "the first piece of the video": (decode, "frame_bytes", 1),
    "the second piece of the video": (decode, "frame_bytes", 2),
}


@pytest.mark.usefixtures("taking_less")
@pytest.mark.parametrize("point", POINTS)
def test_an_allocation_that_fails_is_survived_and_said(
    point: str, shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = tmp_path / "x.mp4"
    wanted = request(shrunken_folder(T2V), video)
    expected = generate(wanted)
    owner, name, at = POINTS[point]
    failing = Failing(getattr(owner, name), at)
    monkeypatch.setattr(owner, name, failing)
    result = generate(wanted)
    assert failing.calls > at
    notes = result.report["memory"]["notes"]
    assert any("memory ran out" in note and "2.00 GiB" in note for note in notes)
    # What helps is said, and only that: the text has no tiles.
    of_text = point in ("loading the text encoder", "the first text", "the second text")
    assert any("text encoder's" in note for note in notes) == of_text
    assert any("tiles" in note for note in notes) == ("VAE" in point or "piece" in point)
    assert result.report["output"]["frames"] == expected.report["output"]["frames"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.usefixtures("taking_less")
@pytest.mark.parametrize(
    "point", ["the first text", "the feed-forward of the second step", "loading the VAE"]
)
def test_if_it_fails_again_the_message_has_the_numbers_and_the_advice(
    point: str, shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, at = POINTS[point]
    with Session() as session:
        wanted = request(shrunken_folder(T2V), tmp_path / "x.mp4")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Failing(getattr(owner, name), at, always=True))
            with pytest.raises(UnsupportedError) as told:
                session.generate(wanted)
        # A shorter video would not make the text smaller.
        advice = ("other programs",) if point == "the first text" else ("--frames", "--size")
        for words in ("ran out of memory", "2.00 GiB", "planned", "free", *advice):
            assert words in str(told.value)
        assert ("--frames" in str(told.value)) == (point != "the first text")
        assert list(tmp_path.iterdir()) == []
        # One can go on.
        assert session.generate(wanted).report["output"]["frames"] == 5


def test_on_a_cpu_less_is_not_to_be_had(
    shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(Block._feed_forward, 2)
    monkeypatch.setattr(Block, "_feed_forward", failing)
    with pytest.raises(UnsupportedError, match=r"the host ran out of memory in denoising"):
        generate(request(shrunken_folder(T2V), tmp_path / "x.mp4"))
    assert failing.calls == 2


@pytest.mark.parametrize(
    ("what", "stage", "where", "advice"),
    [
        ("OutOfMemoryError: CUDA out of memory.", "denoise", "H100", "--frames"),
        ("OutOfMemoryError: CUDA out of memory.", "text", "H100", "; close other"),
        ("MemoryError: 0.03 GiB of pinned host memory were refused", "text", "the host", "; close"),
        ("RuntimeError: DefaultCPUAllocator: can't", "denoise", "the host", "; close"),
        ("RuntimeError: DefaultCPUAllocator: can't", "decode", "the host", "--frames"),
        ("RuntimeError: CUDA error: out of memory", "", "H100", "in this run"),
    ],
)
def test_whose_memory_ran_out_is_told_apart(what: str, stage: str, where: str, advice: str) -> None:
    short = Shortage(stage="denoise", block_swap=0, tile=None, what="no memory")
    evidence = Evidence().with_shortage(short)
    plan = make_plan(Request(prompt="x"), WAN_14B, machine("H100"), evidence)
    said = str(out_of_memory(plan, what, stage))
    assert said.startswith(("NVIDIA " if where == "H100" else "") + f"{where} ran out of memory")
    assert advice in said
    free = plan.device.memory_free if where == "H100" else plan.memory.host_room
    assert plan.memory.room < plan.device.memory_free
    assert f"{free / GIB:.2f} GiB free" in said


def test_pinned_memory_that_is_refused_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(MemoryError, match=r"0\.25 GiB of pinned host memory"):
        pinned_empty((1 << 28,), torch.uint8)


def test_the_step_is_made_again_and_only_it(
    shrunken_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taking_less: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = generate(request(shrunken_folder(T2V), tmp_path / "x.mp4", steps=4))
    calls = sum(row["calls"] for row in plain.report["attention"]["ran"])
    monkeypatch.setattr(denoise._Forward, "_predict", Failing(denoise._Forward._predict, 5))
    with caplog.at_level(logging.WARNING):
        again = generate(request(shrunken_folder(T2V), tmp_path / "x.mp4", steps=4))
    assert "with 2 of" in caplog.text
    # The last two steps in chunks, where each head is a call of its own.
    found = sum(row["calls"] for row in again.report["attention"]["ran"])
    assert found == calls // 2 + calls // 2 * 2
    assert again.report["memory"]["swapped_blocks"] == 2
    assert again.report["memory"]["pinned_bytes"] > 0


WAYS: dict[str, dict[str, Any]] = {
    "swapped": {"block_swap": 2, "pin_budget": PLENTY},
    "swapped, one pinned": {"block_swap": 2, "pin_budget": 300_000},
    "swapped, none pinned": {"block_swap": 2, "pin_budget": 0},
    "in chunks": {"chunks": Chunks(7, 1)},
    "text encoder swapped": {"text_swap": 2, "text_pin_budget": PLENTY},
    "swapped, in chunks": {"block_swap": 1, "pin_budget": PLENTY, "chunks": Chunks(16, None)},
}


@pytest.mark.parametrize("name", [T2V, "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("way", WAYS)
def test_latents_are_the_same_wherever_the_weights_are(
    name: str, way: str, shrunken_folder: Folder
) -> None:
    plan = plan_for(shrunken_folder(name))
    exact, found = latents_of(plan), latents_of(planned(plan, **WAYS[way]))
    if "chunks" in WAYS[way]:
        assert difference(found, exact) < 1e-4
    else:
        assert torch.equal(found, exact)


def test_the_demo_model_in_bfloat16_is_the_same_swapped_and_within_a_thousandth_in_chunks(
    tmp_path: Path,
) -> None:
    from sagewan.checkpoint.find import find_model
    from sagewan.plan.evidence import Evidence
    from sagewan.plan.plan import make_plan
    from sagewan.plan.request import Request
    from tests.machines import machine

    prompt = "a red ball rolls to the right"
    asked = Request(prompt=prompt, seed=1, steps=2, frames=9, attention="sdpa", dtype="bfloat16")
    plan = make_plan(asked, find_model("demo"), machine(), Evidence())
    plain = latents_of(plan)
    swapped = latents_of(planned(plan, block_swap=5, pin_budget=PLENTY))
    assert torch.equal(swapped, plain)
    exact = latents_of(replace(plan, dtype="float32"))
    chunked = latents_of(planned(replace(plan, dtype="float32"), chunks=Chunks(50, 1)))
    assert difference(chunked, exact) < 1e-3


def test_tiled_frames_are_the_same_but_for_rounding(
    shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagewan.pipeline.guard import FrameGuard
    from tests.pipeline.test_decode import noise

    plan = plan_for(shrunken_folder("wan2.2-ti2v-5b"), size=(224, 160), frames=9)
    components = build(plan, Launcher())
    latents = noise(plan)
    whole = list(decode.decode(components, plan, latents, FrameGuard()))
    tiled = list(
        decode.decode(components, planned(plan, decode_tile=(4, 5)), latents, FrameGuard())
    )
    assert len(whole) == len(tiled) == 9
    for one, other in zip(whole, tiled, strict=True):
        assert abs(one.astype(int) - other.astype(int)).max() <= 1


def test_a_part_that_fails_on_its_way_to_the_device_is_loaded_again(
    shrunken_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagewan.memory.mover import DirectMover

    plan = plan_for(shrunken_folder(T2V))
    with Session() as session:
        part = build(plan, Launcher(), session).transformers[0]
        with part.on("cpu") as module:
            saved = {name: value.clone() for name, value in module.state_dict().items()}
        part.close()
        with monkeypatch.context() as patch:
            patch.setattr(DirectMover, "place", Failing(DirectMover.place, 1))
            with pytest.raises(torch.cuda.OutOfMemoryError), part.on("cpu"):
                pass
        where = Place(device="cpu", swapped=1, pin_budget=PLENTY)
        with part.on(where) as module:
            found = {name: value.clone() for name, value in module.state_dict().items()}
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert all(tensor.device.type == "cpu" for tensor in tensors_of(module))


_KILLED = """
import os, sys
from pathlib import Path
import torch
from sagewan.model.block import Block
from sagewan.cli import main

feed = Block._feed_forward
calls = 0
def slow(self, *args):
    global calls
    calls += 1
    if calls == 3:
        Path(sys.argv[1]).write_text("now")
        import time; time.sleep(60)
    return feed(self, *args)
Block._feed_forward = slow
main(["generate", "a red ball rolls to the right", "--seed", "1", "--steps", "2",
      "-o", sys.argv[2]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_process_killed_in_mid_step_leaves_no_partial_file_and_no_lock(tmp_path: Path) -> None:
    folder, ready = tmp_path / "out", tmp_path / "ready"
    folder.mkdir()
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "data"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", _KILLED, str(ready), str(folder / "x.mp4")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        began = time.monotonic()
        while not ready.exists() and time.monotonic() - began < 60:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert list(folder.iterdir()) == []
    # The record can be read and written at once, by another process.
    jobs = subprocess.run(
        [sys.executable, "-m", "sagewan", "jobs"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert jobs.returncode == 0, jobs.stderr


def test_twenty_videos_leave_no_tensor_behind(shrunken_folder: Folder, tmp_path: Path) -> None:
    wanted = request(shrunken_folder(T2V), tmp_path / "x.mp4", steps=1)
    with Session() as session:
        for _ in range(2):
            session.generate(wanted)
        before = live_bytes()
        for _ in range(20):
            session.generate(wanted)
        assert live_bytes() <= 1.01 * before


def live_bytes() -> int:
    """Bytes of all tensors of the process, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
