"""Muon: momentum whose matrices are made orthogonal before each step (K. Jordan, 2024).

Every matrix of one shape goes through the Newton-Schulz iteration in one batch, so a small model
with many layers pays for a few launches. The step is scaled to AdamW's usual size (0.2 a weight,
arXiv:2502.16982), so both share one learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
DECAY = 0.01
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: fast, not exact, and enough


def orthogonal(x: Tensor, iterations: int = 5) -> Tensor:
    """[K, A, B] → the nearest matrices with singular values near 1, computed in bf16."""
    tall = x.shape[1] > x.shape[2]
    y = x.to(torch.bfloat16)
    y = y.mT if tall else y
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


class Muon:
    """Steps the matrices it is given; their gradients are read and left as they are."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[tuple(parameter.shape)].append(parameter)
        self.groups = [(p, torch.zeros(len(p), *p[0].shape, device=p[0].device))
                       for p in by_shape.values()]  # fmt: skip

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """rate: a scalar on the parameters' device, so that a CUDA graph can hold the step."""
        for parameters, momentum in self.groups:
            gradient = torch.stack([p.grad for p in parameters])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM))
            size = 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(parameters, 1 - rate * DECAY)
            torch._foreach_add_(parameters, list((update * (-size * rate)).unbind()))
