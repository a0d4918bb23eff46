"""Attention inputs of the two families that docs and tests quote errors for, seeded."""

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]
HEAD_DIM = 128


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bias(tokens: int, *, heads: int = 2, head_dim: int = HEAD_DIM, seed: int = 0) -> Inputs:
    """Every key counts; K and V have a mean by channel. [1, H, N, D] float32 each."""
    shape, channels = (1, heads, tokens, head_dim), (1, heads, 1, head_dim)
    q = 1.5 * normal(*shape, seed=seed)
    k = normal(*shape, seed=seed + 1) + 3 * normal(*channels, seed=seed + 2)
    v = normal(*shape, seed=seed + 3) + 0.5 * normal(*channels, seed=seed + 4)
    return q, k, v


def local(tokens: int, *, heads: int = 2, head_dim: int = HEAD_DIM, seed: int = 0) -> Inputs:
    """Like video: each query attends to the 64 keys around it. [1, H, N, D] float32 each."""
    shape = (1, heads, tokens, head_dim)
    places = normal(1, heads, -(-tokens // 64), head_dim, seed=seed)
    base = places.repeat_interleave(64, 2)[:, :, :tokens] + 0.5 * normal(*shape, seed=seed + 1)
    q = 1.5 * base + 0.5 * normal(*shape, seed=seed + 2)
    k = base + 3 * normal(1, heads, 1, head_dim, seed=seed + 3)
    return q, k, normal(*shape, seed=seed + 4)
