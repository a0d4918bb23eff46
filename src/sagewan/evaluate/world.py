"""The demo model's world: its names, its colours, and the outlines of its shapes.

Coordinates run from -1 (left, top) to 1 (right, bottom) of a square picture; a radius is in the
same unit. ``demo/world.py`` draws clips of it, :mod:`sagewan.evaluate.checker` reads them.
"""

import math

import torch
from torch import Tensor

SHAPES = ("ball", "square", "triangle", "star", "heart", "ring")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.52, 0.02),
    "yellow": (0.99, 0.88, 0.10),
    "green": (0.16, 0.72, 0.22),
    "blue": (0.10, 0.36, 0.98),
    "purple": (0.56, 0.16, 0.78),
    "pink": (1.00, 0.52, 0.76),
    "white": (0.98, 0.98, 0.98),
}
SIZES = ("small", "large")
MOTIONS = ("right", "left", "up", "down", "grow", "shrink", "still", "orbit", "bounce")
BACKGROUNDS = {
    "grey": (0.52, 0.52, 0.54),
    "black": (0.09, 0.09, 0.10),
    "brown": (0.38, 0.25, 0.15),
    "teal": (0.07, 0.42, 0.44),
    "beige": (0.80, 0.70, 0.53),
    "navy": (0.07, 0.11, 0.31),
}
NAMES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
OF_OBJECT = ("shape", "colour", "size", "motion")
RADIUS = (0.29, 0.42)  # small, large: of one object alone; two share the picture at one size


def held_out(shape: Tensor, colour: Tensor, motion: Tensor) -> Tensor:
    """Bool, for indices of any one shape: combinations that training never shows (one in nine)."""
    return (7 * shape + 3 * colour + motion) % 9 == 0


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square() + 1e-9).sqrt()


def _box(x: Tensor, y: Tensor) -> Tensor:
    corner = 0.12
    dx, dy = x.abs() - (0.84 - corner), y.abs() - (0.84 - corner)
    return _length(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0) - corner


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.25  # the middle of its height, not its centroid, is the centre
    inner = 0.58
    return torch.maximum(y, 0.8660 * x.abs() - 0.5 * y) - inner


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, the first upwards: fold into one half point, then the distance to its edge."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    length = _length(x, y)
    outer, inner = 1.16, 0.52
    tip_x, valley_x = outer, inner * math.cos(sector / 2)
    valley_y = inner * math.sin(sector / 2)
    normal = math.hypot(valley_y, tip_x - valley_x)
    along, across = length * folded.cos(), length * folded.sin()
    return ((along - tip_x) * valley_y + across * (tip_x - valley_x)) / normal


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two circles above, two tangents that meet in a point below."""
    x = x.abs()
    lobe_x, lobe_y, lobe = 0.46, -0.28, 0.54
    circle = _length(x - lobe_x, y - lobe_y) - lobe
    # The tangent from the point (0, 0.98) to the lobe, on the side away from the axis.
    dx, dy = lobe_x, lobe_y - 0.98
    reach = math.hypot(dx, dy)
    angle = math.atan2(dy, dx) + math.asin(lobe / reach)
    nx, ny = -math.sin(angle), math.cos(angle)
    tangent = x * nx + (y - 0.98) * ny
    length = math.sqrt(reach**2 - lobe**2)
    along = x * math.cos(angle) + (y - 0.98) * math.sin(angle)
    # Below the line through both tangent points the body is the wedge, above it the lobes.
    wedge = torch.maximum(tangent, along - length)
    core = torch.maximum(x - lobe_x, torch.maximum(lobe_y - y, tangent))
    return torch.minimum(torch.minimum(circle, core), torch.maximum(wedge, -0.02 - along))


def _ball(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 1


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_ball(x, y) + 0.25).abs() - 0.24


_OUTLINES = {
    "ball": _ball,
    "square": _box,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
}


def distances(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Signed distance (negative inside), in radii. x, y [B, ...]; shape int64 [B] → [B, ...]."""
    x, y = torch.broadcast_tensors(x, y)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for number, name in enumerate(SHAPES):
        chosen = (shape == number).nonzero()[:, 0]
        out[chosen] = _OUTLINES[name](x[chosen], y[chosen])
    return out
