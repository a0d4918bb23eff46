import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sagewan.memory.mover import DirectMover
from sagewan.memory.pinned import NoRegister, PinnedMemory
from sagewan.memory.placement import Place, Placement
from sagewan.memory.swap import BlockSwap, spread
from sagewan.memory.tensors import nbytes_of, packed_bytes, tensors_of
from tests.memory.movers import EarlyMover, LateMover

GENEROUS = 1 << 30
MOVERS = [DirectMover, LateMover, EarlyMover]


class Block(nn.Module):
    """Parameters of two dtypes, a buffer of bytes, and one number: as packed layers have them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(6, 6)
        self.linear.weight.data = torch.randn(6, 6, generator=generator)
        self.shift = nn.Parameter(torch.randn(6, generator=generator).bfloat16())
        self.register_buffer("packed", torch.randint(0, 9, (7,), generator=generator).byte())
        self.register_buffer("scale", torch.rand((), generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) + self.shift + self.packed[:6] * self.scale)


class Stack(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block(seed) for seed in range(count))
        self.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Refusing(NoRegister):
    """Locks so many times, and then no more."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.locked = 0

    def lock(self, address: int, nbytes: int) -> str | None:
        if self.left == 0:
            return "no memory to lock"
        self.left -= 1
        self.locked += 1
        return None

    def unlock(self, address: int) -> None:
        self.locked -= 1


@contextmanager
def placed(stack: Stack, mover: object, **place: int) -> Iterator[Placement]:
    placement = Placement(stack, stack.blocks, Place(device="cpu", **place), mover=mover)  # type: ignore[arg-type]
    yield placement
    placement.close()


@given(st.integers(1, 60), st.integers(0, 60))
def test_swapped_blocks_are_spread_evenly(blocks: int, count: int) -> None:
    count = min(count, blocks)
    chosen = spread(count, blocks)
    assert len(chosen) == count
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("budget", [GENEROUS, 5000, 0])
@settings(max_examples=12)
@given(blocks=st.integers(1, 7), swapped=st.integers(0, 7), passes=st.integers(1, 3))
def test_a_swapped_stack_computes_the_same_bits(
    mover: type, budget: int, blocks: int, swapped: int, passes: int
) -> None:
    stack = Stack(blocks)
    x = torch.randn(3, 6)
    expected = stack(x)
    with placed(stack, mover(), swapped=swapped, pin_budget=budget):
        for _ in range(passes):
            assert torch.equal(stack(x), expected)


def test_the_buffer_of_a_block_is_filled_with_the_next_but_one_when_it_has_run() -> None:
    stack, mover = Stack(4), LateMover()
    with placed(stack, mover, swapped=4, pin_budget=GENEROUS):
        mover.log.clear()
        stack(torch.zeros(1, 6))
        each = ["compute waits", "computed", "copy waits", "copy"]
        assert mover.log == each * 4


def test_two_swapped_blocks_have_a_buffer_each_and_are_copied_once() -> None:
    stack, mover = Stack(5), LateMover()
    with placed(stack, mover, swapped=2, pin_budget=GENEROUS):
        for _ in range(3):
            stack(torch.zeros(1, 6))
        assert mover.log.count("copy") == 2


def test_on_the_device_are_the_residents_and_two_buffers() -> None:
    stack, mover = Stack(6), LateMover()
    size = packed_bytes(tensors_of(stack.blocks[0]))
    with placed(stack, mover, swapped=5, pin_budget=GENEROUS) as placement:
        assert mover.log[:3].count(f"empty {size}") == 2
        assert placement.pinned_bytes == 5 * size


def test_pinned_memory_has_the_size_that_was_asked_for_and_is_given_back() -> None:
    register = Refusing(100)
    pinned = PinnedMemory(10_000, register)
    first, second = pinned.allocate(6_000), pinned.allocate(4_000)
    assert first is not None
    assert second is not None
    assert (first.nbytes, pinned.used, register.locked) == (6_000, 10_000, 2)
    assert pinned.allocate(1) is None
    assert pinned.refusal is None
    pinned.free(first)
    pinned.free(second)
    assert (pinned.used, register.locked) == (0, 0)


@pytest.mark.parametrize("times", range(6))
def test_where_the_system_refuses_to_pin_the_rest_is_staged_and_it_is_said(times: int) -> None:
    stack, mover = Stack(4), LateMover(register=Refusing(times))
    x = torch.randn(2, 6)
    expected = stack(x)
    with placed(stack, mover, swapped=4, pin_budget=GENEROUS) as placement:
        assert torch.equal(stack(x), expected)
        assert torch.equal(stack(x), expected)
        assert placement.swap is not None
        assert placement.swap.unpinned_blocks == 4 - min(times, 4)
        assert (placement.refusal is None) == (times >= 4)
        if placement.refusal:
            assert "no memory to lock" in placement.refusal
    assert mover.register.locked == 0  # type: ignore[attr-defined]


def test_a_budget_below_all_blocks_pins_two_buffers_for_the_others_first() -> None:
    stack = Stack(6)
    size = packed_bytes(tensors_of(stack.blocks[0]))
    with placed(stack, DirectMover(), swapped=6, pin_budget=4 * size) as placement:
        assert placement.swap is not None
        assert placement.swap.unpinned_blocks == 4
        assert placement.pinned_bytes == 4 * size


def test_a_module_leaves_and_comes_back_as_it_was() -> None:
    stack, mover = Stack(4), LateMover()
    x = torch.randn(2, 6)
    expected = stack(x)
    place = Place(device="cpu", swapped=3, pin_budget=GENEROUS, keeps_host=True)
    placement = Placement(stack, stack.blocks, place, mover=mover)
    for _ in range(2):
        assert torch.equal(stack(x), expected)
        placement.leave()
        assert torch.equal(stack(x), expected)  # on the host
        placement.enter()
    placement.close()
    assert {tensor.device.type for tensor in tensors_of(stack)} == {"meta"}


def test_a_block_that_fails_in_its_turn_leaves_nothing_behind() -> None:
    stack, mover = Stack(4), LateMover(register=Refusing(100))
    placement = Placement(
        stack, stack.blocks, Place(device="cpu", swapped=4, pin_budget=GENEROUS), mover=mover
    )
    with pytest.raises(RuntimeError, match="shapes"):
        stack.blocks[1](torch.zeros(1, 5))
    placement.close()
    assert mover.register.locked == 0  # type: ignore[attr-defined]


def test_hooks_go_with_the_swap() -> None:
    stack = Stack(3)
    swap = BlockSwap(stack.blocks, DirectMover(), PinnedMemory(GENEROUS, NoRegister()))
    swap.start()
    swap.stop()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in stack.blocks)


def test_no_pinned_page_stays_in_the_process_after_many_rounds() -> None:
    """The growth of the process's memory, over rounds that each pin 8 MiB."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096

    def round_() -> None:
        pinned = PinnedMemory(GENEROUS, NoRegister())
        buffer = pinned.allocate(8 << 20)
        assert buffer is not None
        buffer.fill_(1)
        pinned.free(buffer)

    round_()
    before = resident()
    for _ in range(20):
        round_()
    assert resident() - before < 8 << 20


def test_bytes_of_a_module_count_what_is_shared_once() -> None:
    stack = Stack(2)
    stack.blocks[1].linear.weight = stack.blocks[0].linear.weight
    assert nbytes_of(stack) == nbytes_of(Stack(2)) - 6 * 6 * 4
