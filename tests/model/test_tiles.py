"""The order of the tokens and what attends to what, for any size of the video."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagewan.kernels import key_blocks
from sagewan.model.tiles import Tiles, nearest_blocks, token_order
from sagewan.plan import sparsity as plans
from sagewan.plan.sparsity import Sparsity, SparsityPlan, plan_sparsity
from sagewan.reference import attention as reference

WAN_720P = (21, 45, 80)
grids = st.tuples(st.integers(1, 9), st.integers(1, 50), st.integers(1, 50))


def plan_for(grid: tuple[int, int, int], text: str) -> SparsityPlan:
    plan = plan_sparsity(Sparsity.parse(text), grid, 16)
    assert plan
    return plan


def test_everyone_means_the_same_by_a_block() -> None:
    assert plans.BLOCK == key_blocks.BLOCK == reference.BLOCK


@given(grids)
def test_the_order_has_each_token_once_and_frames_stay_together(
    grid: tuple[int, int, int],
) -> None:
    frames, rows, columns = grid
    order = token_order(grid)
    assert torch.equal(order.sort().values, torch.arange(frames * rows * columns))
    assert torch.equal(order // (rows * columns), torch.arange(len(order)) // (rows * columns))


@pytest.mark.parametrize("grid", [WAN_720P, (21, 30, 52), (31, 44, 80)])
def test_a_block_is_a_compact_patch(grid: tuple[int, int, int]) -> None:
    _, rows, columns = grid
    sides = []
    for block in token_order(grid).split(128):
        row, column = block // columns % rows, block % columns
        sides.append(float(row.max() - row.min() + column.max() - column.min()))
    # Of 128 tokens as they come in a frame of 80 columns: 2 rows and 80 columns.
    assert sum(sides) / len(sides) < 30


@settings(max_examples=30)
@given(grids, st.sampled_from(["radial:0.75", "sta:0.5", "radial:0.9"]))
def test_every_block_keeps_itself_and_as_many_as_all_others(
    grid: tuple[int, int, int], text: str
) -> None:
    plan = plan_for(grid, text)
    mask = nearest_blocks(plan, token_order(grid))
    assert mask.shape == (1, 1, plan.blocks, plan.blocks)
    assert (mask.sum(-1) == plan.kept).all()
    assert mask[0, 0].diagonal().all()


def frames_of_blocks(plan: SparsityPlan) -> torch.Tensor:
    """The frame in the middle of each block."""
    return (torch.arange(plan.blocks) * 128 + 64) // (plan.grid[1] * plan.grid[2])


def test_radial_thins_out_with_the_distance_in_time_and_keeps_the_first_frame() -> None:
    plan = plan_for(WAN_720P, "radial:0.75")
    mask = nearest_blocks(plan, token_order(WAN_720P))[0, 0]
    frame = frames_of_blocks(plan)
    assert mask[:, frame == 0].all()
    middle = mask[frame == 10].float().mean(0)
    shares = [float(middle[frame == 10 + far].mean()) for far in (1, 2, 4, 8)]
    # Half as many at twice the distance, give or take whole blocks and what the frame cuts off,
    # until it is about one.
    for near, far in itertools.pairwise(shares[:3]):
        assert 0.4 < far / near < 0.65, shares
    assert shares[3] < shares[2] / 2


def test_the_rest_of_ones_own_frame_is_nearer_than_the_same_place_far_away() -> None:
    # Two blocks a frame.
    plan = plan_for((32, 16, 16), "radial:0.75")
    mask = nearest_blocks(plan, token_order(plan.grid))[0, 0]
    for block in range(plan.blocks):
        assert mask[block, block ^ 1]
    assert not mask[63, 2:30].any()


def test_sta_is_a_window_that_stays_inside() -> None:
    plan = plan_for(WAN_720P, "sta:0.75")
    mask = nearest_blocks(plan, token_order(WAN_720P))[0, 0]
    frame = frames_of_blocks(plan)
    # Half as many frames as tokens wide: from the middle, about all 21 frames of 34 × 34 tokens.
    for query in (0, plan.blocks // 2, plan.blocks - 1):
        _, counts = frame[mask[query]].unique(return_counts=True)
        assert 12 <= len(counts) <= 21
        assert counts.max() <= 16  # of 28 blocks a frame
    assert frame[mask[0]].min() == 0
    assert frame[mask[-1]].max() == 20


def test_arranged_and_restored_undo_each_other() -> None:
    tiles = Tiles.of(plan_for((3, 13, 17), "sta:0.5"), "cpu")
    x = torch.randn(2, 3 * 13 * 17, 4)
    assert torch.equal(tiles.restored(tiles.arranged(x)), x)
    assert not torch.equal(tiles.arranged(x), x)


@pytest.mark.parametrize(("grid", "share"), [((1, 45, 80), 0.5), ((5, 30, 52), 0.9)])
def test_a_short_video_keeps_what_is_near_not_the_beginning_of_its_first_frame(
    grid: tuple[int, int, int], share: float
) -> None:
    plan = plan_for(grid, f"radial:{share},0")
    order = token_order(grid)
    _, rows, columns = grid
    places = torch.stack([order // columns % rows, order % columns], 1).float().split(128)
    centres = torch.stack([block.mean(0) for block in places])
    apart = torch.cdist(centres, centres)
    kept = apart[nearest_blocks(plan, order)[0, 0]]
    assert kept.mean() < 0.75 * apart.mean()
