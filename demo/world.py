"""The demo model's world: one flat shape that moves on a plain background, drawn on the GPU.

A `Scene` is a batch of clips as plain tensors; `render` turns it into pixels with signed distance
functions, so edges are anti-aliased at any size and the exact mask of the object is known.
Coordinates run from -1 (left, top) to 1 (right, bottom); a radius is in the same unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

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
MOTIONS = ("right", "left", "up", "down", "grow", "shrink", "still", "circle", "bounce")
TAUGHT = MOTIONS[:7]  # what captions speak of; the autoencoder is shown the others too
BACKGROUNDS = {
    "grey": (0.52, 0.52, 0.54),
    "black": (0.09, 0.09, 0.10),
    "brown": (0.38, 0.25, 0.15),
    "teal": (0.07, 0.42, 0.44),
    "beige": (0.80, 0.70, 0.53),
    "navy": (0.07, 0.11, 0.31),
}
COUNTS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "background": len(BACKGROUNDS),
}
RADIUS = (0.27, 0.42)  # small, large; jittered by ±8 %
FRAMES, SIDE = 17, 256


@dataclass(frozen=True)
class Scene:
    """B clips. Attributes are int64 [B] indices into the tables above; the rest is float32.

    start [B, 2]: centre at time 0; travel [B, 2]: straight displacement; swing [B, 2]: radius of
    the circle (its sign is the direction) and height of the hops; growth [B]: log of the ratio of
    last radius to first; radius [B]: geometric mean over the clip.
    """

    shape: Tensor
    colour: Tensor
    size: Tensor
    motion: Tensor
    background: Tensor
    radius: Tensor
    growth: Tensor
    travel: Tensor
    swing: Tensor
    phase: Tensor
    start: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Scene:
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scene:
        return Scene(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def held_out(shape: Tensor, colour: Tensor, motion: Tensor) -> Tensor:
    """bool [B]: combinations that training never shows (one in nine)."""
    return (7 * shape + 3 * colour + motion) % 9 == 0


def draw_attributes(
    count: int, unseen: bool, generator: torch.Generator, motions: int
) -> dict[str, Tensor]:
    """Attributes int64 [count] on the CPU, all from the held-out combinations or none of them."""
    counts = COUNTS | {"motion": motions}
    drawn: dict[str, list[Tensor]] = {name: [] for name in COUNTS}
    found = 0
    while found < count:
        batch = {n: torch.randint(k, (4 * count,), generator=generator) for n, k in counts.items()}
        keep = held_out(batch["shape"], batch["colour"], batch["motion"]) == unseen
        for name, values in batch.items():
            drawn[name].append(values[keep])
        found += int(keep.sum())
    return {name: torch.cat(parts)[:count] for name, parts in drawn.items()}


def make_scene(attributes: dict[str, Tensor], generator: torch.Generator) -> Scene:
    """Draw what the attributes leave open so that the object stays inside the frame throughout."""
    motion = attributes["motion"]
    count = len(motion)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def when(name: str) -> Tensor:
        return (motion == MOTIONS.index(name)).float()

    radius = torch.tensor(RADIUS)[attributes["size"]] * uniform(0.92, 1.08)
    growth = torch.log(uniform(1.8, 2.1)) * (when("grow") - when("shrink"))
    largest = radius * torch.exp(growth.abs() / 2)
    room = 0.94 - 1.05 * largest
    distance = 2 * room * uniform(0.45, 0.75)
    travel = torch.stack(
        [distance * (when("right") - when("left")), distance * (when("down") - when("up"))], -1
    )
    turn = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    swing = torch.stack(
        [uniform(0.24, 0.34) * turn * when("circle"), uniform(0.38, 0.56) * when("bounce")], -1
    )
    scene = Scene(
        **attributes,
        radius=radius,
        growth=growth,
        travel=travel,
        swing=swing,
        phase=uniform(0, 2 * math.pi),
        start=torch.zeros(count, 2),
    )
    centre, _ = paths(scene, FRAMES)
    low, high = centre.amin(1), centre.amax(1)
    place = torch.rand(count, 2, generator=generator)
    return replace(scene, start=torch.lerp(-room[:, None] - low, room[:, None] - high, place))


def sample_scene(
    count: int, generator: torch.Generator, *, unseen: bool = False, every_motion: bool = False
) -> Scene:
    """A random batch on the CPU; `unseen` draws only held-out combinations."""
    motions = len(MOTIONS if every_motion else TAUGHT)
    return make_scene(draw_attributes(count, unseen, generator, motions), generator)


def paths(scene: Scene, frames: int) -> tuple[Tensor, Tensor]:
    """Centre [B, T, 2] and radius [B, T] of the object over the clip."""
    time = torch.linspace(0, 1, frames, device=scene.start.device)
    angle = 2 * math.pi * time + scene.phase[:, None] * scene.swing[:, :1].sign()
    loop, hop = scene.swing[:, 0, None], scene.swing[:, 1, None]
    begin = angle[:, :1]
    circle = torch.stack(
        [loop.abs() * (angle.cos() - begin.cos()), loop * (angle.sin() - begin.sin())], -1
    )
    bounce = torch.stack([0 * angle, -hop * (2 * math.pi * time).sin().abs()], -1)
    straight = scene.travel[:, None] * time[:, None]
    centre = scene.start[:, None] + straight + circle + bounce
    return centre, scene.radius[:, None] * torch.exp(scene.growth[:, None] * (time - 0.5))


def _box(x: Tensor, y: Tensor) -> Tensor:
    corner = 0.12
    dx, dy = x.abs() - (0.84 - corner), y.abs() - (0.84 - corner)
    outside = (dx.clamp(min=0).square() + dy.clamp(min=0).square() + 1e-9).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.25  # the middle of its height, not its centroid, is the centre
    inner = 0.58
    return torch.maximum(y, 0.8660 * x.abs() - 0.5 * y) - inner


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, the first upwards: fold into one half point, then the distance to its edge."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    length = (x.square() + y.square() + 1e-9).sqrt()
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
    circle = ((x - lobe_x).square() + (y - lobe_y).square() + 1e-9).sqrt() - lobe
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
    return (x.square() + y.square() + 1e-9).sqrt() - 1


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_ball(x, y) + 0.28).abs() - 0.27


OUTLINES = {
    "ball": _ball,
    "square": _box,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
}


def distances(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Signed distance (negative inside), in radii. x, y [B, ...]; shape [B] → [B, ...]."""
    x, y = torch.broadcast_tensors(x, y)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for number, name in enumerate(SHAPES):
        chosen = (shape == number).nonzero()[:, 0]
        out[chosen] = OUTLINES[name](x[chosen], y[chosen])
    return out


def _grid(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    axis = (torch.arange(side, device=device) + 0.5) * 2 / side - 1
    return axis[None, None, None, :], axis[None, None, :, None]


def draw_background(scene: Scene, frames: int, side: int) -> Tensor:
    """[B, 3, T, H, W]: the colour, a little lighter above and darker in the corners."""
    x, y = _grid(side, scene.start.device)
    table = torch.tensor(list(BACKGROUNDS.values()), device=scene.start.device)
    light = 1.06 - 0.10 * (x.square() + y.square()) - 0.05 * y
    return table[scene.background][:, :, None, None, None] * light[:, None].expand(
        len(scene), 3, frames, side, side
    )


def draw_object(canvas: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """Paint the object and its soft shadow over canvas [B, 3, T, H, W].

    → the new canvas, and the object with a rim of 3 pixels [B, 1, T, H, W] in 0..1.
    """
    frames, side = canvas.shape[2], canvas.shape[-1]
    centre, radius = paths(scene, frames)
    gx, gy = _grid(side, canvas.device)
    r = radius[:, :, None, None]
    x = (gx - centre[..., 0, None, None]) / r
    y = (gy - centre[..., 1, None, None]) / r
    pixels = r * side / 2  # pixels a radius
    distance = distances(x, y, scene.shape)
    cover = (0.5 - distance * pixels).clamp(0, 1)
    rim = (0.5 - distance * pixels + 3).clamp(0, 1)
    shadow = 0.30 * torch.sigmoid(-8 * distances(x - 0.10, y - 0.16, scene.shape) - 0.5)
    light = 1.0 - 0.10 * (x + y).clamp(-1.2, 1.2) / 2 - 0.14 * torch.sigmoid(14 * distance + 1.5)
    glint = 0.55 * torch.exp(-((x + 0.36).square() + (y + 0.40).square()) / 0.07)
    glint = glint * (scene.shape == SHAPES.index("ball")).view(-1, 1, 1, 1)
    table = torch.tensor(list(COLOURS.values()), device=canvas.device)
    colour = table[scene.colour][:, :, None, None, None] * light[:, None]
    colour = (colour + (1 - colour) * glint[:, None]).clamp(0, 1)
    canvas = canvas * (1 - shadow[:, None])
    return canvas + (colour - canvas) * cover[:, None], rim[:, None]


def render(scene: Scene, frames: int = FRAMES, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """→ clips [B, 3, T, H, W] in 0..1 and the object's mask with its rim [B, 1, T, H, W]."""
    return draw_object(draw_background(scene, frames, side), scene)
