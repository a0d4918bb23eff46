"""Q and K in INT8, as the portable and the Hopper kernels take them.

:func:`plain` smooths K. :func:`smoothed` smooths Q and K and rotates both. As many rows share a
scale as a kernel's block has, because the kernels keep scores as integers until the exponential.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.launch import Tile
from sagewan.kernels.prepare import Recipe, int8_rows
from sagewan.kernels.prepared import Prepared, Rows
from sagewan.kernels.sequence import mean

LOG2E = math.log2(math.e)
# Fewest rows that share a scale.
ROWS_PER_SCALE = 64
# A score and a key's bias are counted in the same integer, which holds 2²² of either sign.
_MOST_COUNT = 2**22


@dataclass(frozen=True, kw_only=True)
class Grain:
    """How many rows of Q, and of K, share a scale."""

    queries: int = ROWS_PER_SCALE
    keys: int = ROWS_PER_SCALE


def grain_of(tile: Tile) -> Grain:
    """What a kernel of this tile takes: a scale for each block, and one for the keys of a step."""
    return Grain(queries=max(ROWS_PER_SCALE, tile.block_m), keys=max(ROWS_PER_SCALE, tile.block_n))


def check_grain(prepared: Prepared[Rows, Any], grain: Grain) -> None:
    """Raise ShapeError for scales that are finer than ``grain``, the finest that a kernel takes."""
    found = Grain(queries=prepared.q.rows_per_scale, keys=prepared.k.rows_per_scale)
    if found.queries % grain.queries or found.keys % grain.keys:
        raise ShapeError(
            f"{found.queries} queries and {found.keys} keys share a scale: prepare them for this "
            f"GPU's kernel, with scales for {grain.queries} and {grain.keys}"
        )


def plain(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    grain: Grain,
    *,
    k_mean: Tensor | None,
    with_lse: bool,
) -> tuple[Rows, Rows]:
    """Q as it is and K minus its mean; ``k_mean`` and ``with_lse`` as for
    :func:`sagewan.kernels.int8_attention.prepare_sageattn`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_mean = mean(k) if k_mean is None else k_mean
    keys = int8_rows(k, Recipe(block=grain.keys), minus=k_mean)
    recipe = Recipe(block=grain.queries, factor=scale * LOG2E, dot_factor=scale)
    return int8_rows(q, recipe, other=k_mean if with_lse else None), keys


def smoothed(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    grain: Grain,
    *,
    k_mean: Tensor | None,
    with_lse: bool,
    along: bool,
) -> tuple[Rows, Rows]:
    """Q and K minus their means, rotated; ``along`` is how keys are rounded.

    The keys' ``dots`` are their scores with Q's mean, in powers of two; the queries' are what the
    log-sum-exp lacks."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_mean, k_mean = mean(q), mean(k) if k_mean is None else k_mean
    for_keys = Recipe(
        block=grain.keys, rotate=True, dot_factor=scale * LOG2E, smoothed=True, along=along
    )
    keys = int8_rows(k, for_keys, minus=k_mean, other=q_mean)
    recipe = Recipe(block=grain.queries, rotate=True, factor=scale * LOG2E, dot_factor=scale)
    queries = int8_rows(
        q,
        recipe,
        minus=q_mean,
        other=k_mean if with_lse else None,
        lowest=lowest_scale(keys),
    )
    return queries, keys


def lowest_scale(keys: Rows) -> Tensor:
    """[B, H] float32: with smaller scales of Q, a key's bias would not fit beside its scores."""
    assert keys.dots is not None
    batch, heads, count = keys.dots.shape
    steps = keys.dots.view(batch, keys.scale.shape[1], -1, count) / keys.scale.unsqueeze(2)
    most: Tensor = torch.linalg.vector_norm(steps, torch.inf, -1)
    # What scores leave, less what float32 may round.
    room = _MOST_COUNT - 127**2 * keys.data.shape[3] - 256
    return most.view(batch, heads) / room


def whole(q: Tensor, k: Tensor, rows: tuple[Rows, Rows], v: Any) -> Prepared[Rows, Any]:
    """Q and K as ``rows``, and V in a kernel's form."""
    return Prepared(
        q=rows[0],
        k=rows[1],
        v=v,
        queries=q.shape[2],
        keys=k.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
    )
