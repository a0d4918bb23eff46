"""Clips of the demo model's world: one or two flat shapes that move on a plain background.

A `Scene` is a batch of clips as plain tensors, all with the same number of objects; `render` turns
it into pixels with signed distance functions, so edges are anti-aliased at any size and the exact
mask of the objects is known. Names, colours and outlines are those of `sagewan.evaluate.world`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sagewan.evaluate.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    NAMES,
    RADIUS,
    SHAPES,
    distances,
    held_out,
)

PAIR_RADIUS = 0.28  # of two objects, side by side
FRAMES, SIDE = 17, 256
LONG_FRAMES, LONG_SIDE = 81, 640  # 8,400 tokens in one forward pass of the transformer
STYLES = ("plain", "night")


@dataclass(frozen=True)
class Scene:
    """B clips of K objects from left to right. Attributes are int64 indices into NAMES: [B, K],
    background [B]; the rest is float32.

    start [B, K, 2]: centre at time 0; travel [B, K, 2]: straight displacement; swing [B, K, 2]:
    radius of the orbit, which runs clockwise from its top, and height of the hops; growth [B, K]:
    log of the ratio of last radius to first; radius [B, K]: geometric mean over the clip.
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
    start: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def objects(self) -> int:
        return self.shape.shape[1]

    def __getitem__(self, index: slice | Tensor) -> Scene:
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scene:
        return Scene(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def attributes(self) -> dict[str, Tensor]:
        """What the checker compares with."""
        return {name: getattr(self, name) for name in NAMES}


def draw_attributes(
    count: int, unseen: bool, generator: torch.Generator, objects: int
) -> dict[str, Tensor]:
    """Attributes on the CPU; of every object the combination is held out, or of none. Two objects
    move differently and have different colours."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    found = 0
    while found < count:
        batch = {
            name: torch.randint(len(names), (8 * count + 64, objects), generator=generator)
            for name, names in NAMES.items()
        }
        batch["background"] = batch["background"][:, 0]
        keep = (held_out(batch["shape"], batch["colour"], batch["motion"]) == unseen).all(1)
        if objects == 2:
            for name in ("motion", "colour"):
                keep &= batch[name][:, 0] != batch[name][:, 1]
        for name, values in batch.items():
            drawn[name].append(values[keep])
        found += int(keep.sum())
    return {name: torch.cat(parts)[:count] for name, parts in drawn.items()}


def make_scene(attributes: dict[str, Tensor], generator: torch.Generator) -> Scene:
    """Draw what the attributes leave open so that every object stays in the picture throughout,
    and of two the first in the left half, the second in the right."""
    motion = attributes["motion"]
    pair = motion.shape[1] == 2

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(motion.shape, generator=generator)

    def when(name: str) -> Tensor:
        return (motion == MOTIONS.index(name)).float()

    radius = torch.tensor((PAIR_RADIUS,) * 2 if pair else RADIUS)[attributes["size"]]
    radius = radius * (uniform(0.94, 1.06) if pair else uniform(0.93, 1.07))
    growth = torch.log(uniform(1.6, 1.85) if pair else uniform(1.7, 1.95))
    growth = growth * (when("grow") - when("shrink"))
    largest = 1.05 * radius * torch.exp(growth.abs() / 2)
    # Half the space an object's centre may use, and the middle of that space.
    room = torch.stack([(0.48 if pair else 0.94) - largest, 0.94 - largest], -1)
    middle = torch.tensor([[-0.5, 0.0], [0.5, 0.0]] if pair else [[0.0, 0.0]])
    across = 2 * room[..., 0] * (uniform(0.85, 1.0) if pair else uniform(0.45, 0.75))
    along = 2 * room[..., 1] * uniform(0.45, 0.75)
    travel = torch.stack([across * (when("right") - when("left")),
                          along * (when("down") - when("up"))], -1)  # fmt: skip
    loop = uniform(0.12, 0.145) if pair else uniform(0.16, 0.22)
    swing = torch.stack([loop * when("orbit"), uniform(0.25, 0.34) * when("bounce")], -1)
    scene = Scene(
        **attributes,
        radius=radius,
        growth=growth,
        travel=travel,
        swing=swing,
        start=torch.zeros(*motion.shape, 2),
    )
    centre, _ = paths(scene, FRAMES)
    low, high = centre.amin(2), centre.amax(2)
    place = torch.rand(*motion.shape, 2, generator=generator)
    return replace(scene, start=torch.lerp(middle - room - low, middle + room - high, place))


def sample_scene(
    count: int,
    generator: torch.Generator,
    *,
    unseen: bool = False,
    objects: int = 1,
    size: str | None = None,
) -> Scene:
    """A random batch on the CPU; `unseen` draws only held-out combinations; with `size` every
    object has that one."""
    attributes = draw_attributes(count, unseen, generator, objects)
    if size:
        attributes["size"].fill_(NAMES["size"].index(size))
    return make_scene(attributes, generator)


def paths(scene: Scene, frames: int) -> tuple[Tensor, Tensor]:
    """Centre [B, K, T, 2] and radius [B, K, T] of every object over the clip."""
    time = torch.linspace(0, 1, frames, device=scene.start.device)
    angle = 2 * math.pi * time
    loop, hop = scene.swing[..., 0, None], scene.swing[..., 1, None]
    orbit = torch.stack([loop * angle.sin(), loop * (1 - angle.cos())], -1)
    bounce = torch.stack([0 * hop * angle, -hop * angle.sin().abs()], -1)
    straight = scene.travel[..., None, :] * time[:, None]
    centre = scene.start[..., None, :] + straight + orbit + bounce
    return centre, scene.radius[..., None] * torch.exp(scene.growth[..., None] * (time - 0.5))


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


def _place(scene: Scene, number: int, canvas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y from the object's centre in radii [B, T, H, W], and pixels a radius [B, T, 1, 1]."""
    frames, side = canvas.shape[2], canvas.shape[-1]
    centre, radius = (p[:, number] for p in paths(scene, frames))
    gx, gy = _grid(side, canvas.device)
    r = radius[:, :, None, None]
    x = (gx - centre[..., 0, None, None]) / r
    y = (gy - centre[..., 1, None, None]) / r
    return x, y, r * side / 2


def _colour(scene: Scene, number: int) -> Tensor:
    table = torch.tensor(list(COLOURS.values()), device=scene.start.device)
    return table[scene.colour[:, number]][:, :, None, None, None]


def draw_object(canvas: Tensor, scene: Scene, number: int) -> tuple[Tensor, Tensor]:
    """Paint one object and its soft shadow over canvas [B, 3, T, H, W].

    → the new canvas, and the object with a rim of 3 pixels [B, 1, T, H, W] in 0..1.
    """
    x, y, pixels = _place(scene, number, canvas)
    shape = scene.shape[:, number]
    distance = distances(x, y, shape)
    cover = (0.5 - distance * pixels).clamp(0, 1)
    rim = (0.5 - distance * pixels + 3).clamp(0, 1)
    shadow = 0.30 * torch.sigmoid(-8 * distances(x - 0.10, y - 0.16, shape) - 0.5)
    light = 1.0 - 0.10 * (x + y).clamp(-1.2, 1.2) / 2 - 0.14 * torch.sigmoid(14 * distance + 1.5)
    glint = 0.55 * torch.exp(-((x + 0.36).square() + (y + 0.40).square()) / 0.07)
    glint = glint * (shape == SHAPES.index("ball")).view(-1, 1, 1, 1)
    colour = _colour(scene, number) * light[:, None]
    colour = (colour + (1 - colour) * glint[:, None]).clamp(0, 1)
    canvas = canvas * (1 - shadow[:, None])
    return canvas + (colour - canvas) * cover[:, None], rim[:, None]


def draw_glow(canvas: Tensor, scene: Scene, number: int) -> tuple[Tensor, Tensor]:
    """Paint one object as a lamp, pale within and with a wide halo; → as `draw_object`."""
    x, y, pixels = _place(scene, number, canvas)
    distance = distances(x, y, scene.shape[:, number])
    cover = (0.5 - distance * pixels).clamp(0, 1)
    halo = 0.5 * torch.exp(-distance.clamp(min=0) / 0.30)
    pale = 0.55 * torch.sigmoid(-9 * distance - 2.0)
    colour = _colour(scene, number)
    canvas = canvas + (colour - canvas) * halo[:, None]
    colour = colour + (1 - colour) * pale[:, None]
    canvas = canvas + (colour - canvas) * cover[:, None]
    return canvas, (0.5 - distance * pixels + 3).clamp(0, 1)[:, None]


def render(
    scene: Scene, frames: int = FRAMES, side: int = SIDE, style: str = "plain"
) -> tuple[Tensor, Tensor]:
    """→ clips [B, 3, T, H, W] in 0..1 and the objects' mask with its rim [B, 1, T, H, W]."""
    canvas = draw_background(scene, frames, side)
    if style == "night":
        canvas = 0.35 * canvas
    draw = draw_glow if style == "night" else draw_object
    rims = []
    for number in range(scene.objects):
        canvas, rim = draw(canvas, scene, number)
        rims.append(rim)
    return canvas, torch.stack(rims).amax(0)
