"""Weights rounded so that their errors make up for one another where a layer's inputs lie.

What a product loses of an input x is (W − Ŵ)·x, and inputs are far from even: most of what they
are is a few directions, such as their mean. So the columns of W are rounded in turns, and what the
columns of all turns before lose along these directions is made up for by those still to come, with
the least change of them. That is the rounding of arXiv:2210.17323 for second moments V·Vᵀ + λ·I,
of which only V is kept: a few numbers for each input, and a state of a few for each output.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Many columns in a turn lose no more than one after the other, and are far quicker.
TURNS = 64
# What is added to the share of the inputs that lies beside the directions: without it, columns
# would be bent far for directions that hold next to everything of the few inputs that were seen.
_DAMPING = 0.05

# Values [N, n] for these columns [n] → the format's nearest.
Nearest = Callable[[Tensor, Tensor], Tensor]


def compensated(weight: Tensor, directions: Tensor, nearest: Nearest) -> Tensor:
    """W [N, K] → values of the format, float32 [N, K].

    ``directions`` [R, K] are the inputs' largest principal directions, each as long as the root of
    its share, so that the mean square of all K inputs is 1.
    """
    columns = directions.to(weight.device, torch.float32).T
    # The largest first: what is left over at the end has the least to be made up for with.
    order = columns.square().sum(1).argsort(descending=True, stable=True)
    at_once = -(-len(order) // TURNS)
    parts = [columns[turn] for turn in order.split(at_once)]
    shares = _makes_up(parts, beside=1 - float(columns.square().sum(1).mean()))
    # Arranged once: columns that lie apart would be slow to read, turn after turn.
    wanted = weight[:, order].float().split(at_once, dim=1)
    lost = weight.new_zeros(weight.shape[0], columns.shape[1], dtype=torch.float32)
    out = []
    for own, turn, part, share in zip(wanted, order.split(at_once), parts, shares, strict=True):
        rounded = nearest(own - lost @ share, turn)
        lost += (rounded - own) @ part
        out.append(rounded)
    return torch.cat(out, dim=1)[:, order.argsort()]


def _makes_up(parts: list[Tensor], beside: float) -> list[Tensor]:
    """For each turn, [R, n]: how much its columns make up for of what was lost along each
    direction, where every column still to come takes its share. ``beside`` is the share of the
    inputs that lies in no direction."""
    # In float64: the sums of all columns hold those of the last few, which are much smaller.
    squares = torch.stack([part.double().T @ part.double() for part in parts])
    to_come = squares.flip(0).cumsum(0).flip(0)
    even = torch.eye(to_come.shape[1], dtype=torch.float64, device=to_come.device)
    inverse = torch.linalg.inv(to_come + (max(beside, 0.0) + _DAMPING) * even).float()
    return [share @ part.T for share, part in zip(inverse, parts, strict=True)]
