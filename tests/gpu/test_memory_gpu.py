"""Swapping, chunks and tiles on a real GPU: the same bits, and memory given back."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagewan.memory.mover import CudaMover
from sagewan.memory.pinned import CudaRegister, PinnedMemory
from sagewan.memory.placement import Place, Placement
from sagewan.memory.upload import upload
from sagewan.pipeline.session import Session
from sagewan.plan.budget.transformer import Chunks
from tests.gpu.test_pipeline_gpu import gpu_plan
from tests.memory.test_swap import Stack
from tests.pipeline.runs import difference, latents_of
from tests.pipeline.test_session import request

pytestmark = pytest.mark.gpu

Folder = Callable[[str], Path]
PLENTY = 1 << 30


@pytest.mark.parametrize("budget", [PLENTY, 3000, 0])
@pytest.mark.parametrize("swapped", [1, 2, 3, 6])
def test_swapped_blocks_compute_the_same_bits(budget: int, swapped: int) -> None:
    x = torch.randn(3, 6, device="cuda")
    stack = Stack(6)
    place = Place(device="cuda:0", keeps_host=True)
    whole = Placement(stack, stack.blocks, place)
    expected = stack(x)
    whole.detach()
    placement = Placement(stack, stack.blocks, replace(place, swapped=swapped, pin_budget=budget))
    for _ in range(20):
        assert torch.equal(stack(x), expected)
    placement.close()


def test_registered_memory_is_pinned_and_copies_pass_beside_the_computing() -> None:
    pinned = PinnedMemory(1 << 28, CudaRegister())
    buffer = pinned.allocate(1 << 27)
    assert buffer is not None
    assert buffer.is_pinned()
    mover = CudaMover("cuda:0")
    target = mover.empty(1 << 27)
    buffer.fill_(7)
    mover.copy_waits(mover.computed())
    mover.copy(target, buffer)
    mover.compute_waits(mover.copied())
    assert bool((target == 7).all())
    pinned.free(buffer)
    assert pinned.used == 0


def test_more_than_there_is_can_t_be_pinned_and_the_gpu_goes_on() -> None:
    problem = CudaRegister().lock(4096, 1 << 40)
    assert problem
    assert float(torch.ones(8, device="cuda").sum()) == 8


WAYS: dict[str, dict[str, Any]] = {
    "swapped": {"block_swap": 2, "pin_budget": PLENTY},
    "swapped, unpinned": {"block_swap": 2, "pin_budget": 0},
    "text encoder swapped": {"text_swap": 2, "text_pin_budget": PLENTY},
    "in chunks": {"chunks": Chunks(7, 1)},
}


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("way", WAYS)
def test_latents_are_the_same_wherever_the_weights_are(
    name: str, way: str, shrunken_folder: Folder
) -> None:
    plan = gpu_plan(shrunken_folder(name))
    other = replace(plan, memory=replace(plan.memory, **WAYS[way]))
    exact, found = latents_of(plan), latents_of(other)
    if "chunks" in way:
        assert difference(found, exact) < 1e-3
    else:
        assert torch.equal(found, exact)


def test_memory_returns_to_its_start_after_twenty_videos(
    shrunken_folder: Folder, tmp_path: Path
) -> None:
    wanted = request(
        shrunken_folder("wan2.1-t2v-1.3b"), tmp_path / "x.mp4", device="cuda", block_swap=2, steps=1
    )
    with Session() as session:
        for _ in range(2):
            session.generate(wanted)
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            session.generate(wanted)
        assert torch.cuda.memory_allocated() <= 1.01 * before
    assert torch.cuda.memory_allocated() <= before


def test_weights_arrive_as_they_were_after_other_work() -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(5000, 4001, generator=generator)
    tensors = [
        large,
        large.bfloat16(),
        torch.randn(7, generator=generator),
        torch.randn(64, 64, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last_3d),
        large[:1000].to(torch.float8_e4m3fn),
    ]
    # The copies' memory is what this work leaves, which is not yet done.
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = torch.tanh(busy @ busy)
    del busy
    arrived = upload(tensors, "cuda")
    for one, wanted in zip(arrived, tensors, strict=True):
        assert one.stride() == wanted.stride()
        assert torch.equal(one.cpu().float(), wanted.float())


@pytest.mark.parametrize("first", ["", "import torch"])
def test_segments_grow_where_a_run_asks_for_them(first: str) -> None:
    """In a process of its own: torch reads its settings once."""
    clean = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    code = f"""{first}
from sagewan.pipeline.probe import probe
asked = probe().segments_grow
import torch
x = torch.zeros(64 << 20, device="cuda")
print(asked, torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""
    said = subprocess.run(
        [sys.executable, "-c", code], env=clean, check=True, capture_output=True, text=True
    )
    assert said.stdout.split() in (["True", "True"], ["False", "False"])
