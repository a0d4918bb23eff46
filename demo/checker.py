"""Reads a clip's pixels and says what it shows: shape, colour, size, motion, background.

It knows nothing of the model. The object is whatever is not the background's colour, lit or in
shadow; its area and centroid over time give the motion, its outline (moved to its centroid and
scaled to equal area) the shape by overlap with the six drawn by `world`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
import world
from torch import Tensor

NOTHING = -1  # an attribute that fits none of the names
CELLS = 40  # side of the normalised outline
SPAN = 1.25  # half its width, in square roots of the object's area


@dataclass(frozen=True)
class Seen:
    """What a batch of clips shows: int64 [B] indices into world's tables, or NOTHING."""

    shape: Tensor
    colour: Tensor
    size: Tensor
    motion: Tensor
    background: Tensor

    def right(self, scene: world.Scene) -> dict[str, Tensor]:
        """bool [B] for each attribute, and "all": shape, colour and motion together."""
        hits = {
            f.name: getattr(self, f.name) == getattr(scene, f.name).to(self.shape.device)
            for f in fields(self)
        }
        return hits | {"all": hits["shape"] & hits["colour"] & hits["motion"]}


def _median(values: Tensor, weight: Tensor) -> Tensor:
    """Median of values [B, 3, N] where weight [B, N] is true → [B, 3]; NaN where none is."""
    return values.masked_fill(~weight[:, None], float("nan")).nanmedian(-1).values


def border_colour(video: Tensor) -> Tensor:
    """Median colour of the outermost pixels of all frames: video [B, 3, T, H, W] → [B, 3]."""
    edge = torch.ones(video.shape[-2:], dtype=torch.bool, device=video.device)
    edge[4:-4, 4:-4] = False
    return video[..., edge].flatten(2).median(-1).values


def object_mask(video: Tensor, border: Tensor) -> Tensor:
    """bool [B, T, H, W]: pixels that are no lighter or darker version of the border's colour."""
    base = border[:, :, None, None, None]
    power = base.square().sum(1, keepdim=True).clamp(min=1e-4)
    light = ((video * base).sum(1, keepdim=True) / power).clamp(0.5, 1.3)
    mask = (video - light * base).square().sum(1).sqrt() > 0.17
    # Drop specks: a pixel stays if most of its 3 x 3 neighbourhood is object too.
    near = F.avg_pool2d(mask.flatten(0, 1)[:, None].float(), 3, 1, 1)[:, 0]
    return mask & (near > 0.5).view_as(mask)


def measure(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Area [B, T] (in squared units of -1..1) and centroid [B, T, 2] of a mask [B, T, H, W]."""
    side = mask.shape[-1]
    axis = (torch.arange(side, device=mask.device) + 0.5) * 2 / side - 1
    weight = mask.float()
    count = weight.sum((-1, -2))
    x = (weight.sum(-2) * axis).sum(-1) / count.clamp(min=1)
    y = (weight.sum(-1) * axis).sum(-1) / count.clamp(min=1)
    return count * (2 / side) ** 2, torch.stack([x, y], -1)


def outline(mask: Tensor, area: Tensor, centroid: Tensor) -> Tensor:
    """Mean normalised mask over the frames: [B, T, H, W] → [B, CELLS, CELLS] in 0..1."""
    batch, frames = area.shape
    axis = torch.linspace(-SPAN, SPAN, CELLS, device=mask.device)
    cells = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    scale = area.clamp(min=1e-4).sqrt().view(-1, 1, 1, 1)
    grid = cells * scale + centroid.view(-1, 1, 1, 2)
    flat = mask.flatten(0, 1)[:, None].float()
    patch = F.grid_sample(flat, grid, align_corners=False)
    return patch.view(batch, frames, CELLS, CELLS).mean(1)


@cache
def _templates(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Outlines [6, CELLS, CELLS], areas of a unit radius [6], border colours [backgrounds, 3]."""
    shapes, grounds = len(world.SHAPES), len(world.BACKGROUNDS)
    count = shapes + grounds
    names = {n: torch.zeros(count, dtype=torch.long) for n in world.COUNTS}
    names["shape"][:shapes] = torch.arange(shapes)
    names["background"][shapes:] = torch.arange(grounds)
    names["motion"][:] = world.MOTIONS.index("still")
    scene = world.make_scene(names, torch.Generator().manual_seed(0)).to(device)
    video, _ = world.render(scene, frames=1)
    border = border_colour(video)
    mask = object_mask(video, border)
    area, centroid = measure(mask)
    unit = area[:shapes, 0] / scene.radius[:shapes].square()
    return outline(mask, area, centroid)[:shapes], unit, border[shapes:]


def read_motion(area: Tensor, centroid: Tensor) -> Tensor:
    """area [B, T], centroid [B, T, 2] → int64 [B] index of the motion, or NOTHING."""
    ends = slice(0, 2), slice(-2, None)
    first, last = (centroid[:, e].mean(1) for e in ends)
    net = last - first
    reach = centroid.amax(1) - centroid.amin(1)
    growth = (area[:, ends[1]].mean(1) / area[:, ends[0]].mean(1).clamp(min=1e-6)).log()
    across, along = net.abs().min(-1).values, net.abs().max(-1).values
    sideways = net[:, 0].abs() > net[:, 1].abs()
    straight = (along > 0.3) & (across < 0.15) & (growth.abs() < 0.45)
    narrow = torch.where(sideways, reach[:, 1], reach[:, 0]) < 0.2
    steady = (growth.abs() < 0.45) & (along < 0.25)
    quiet = reach.amax(-1) < 0.15
    rules = {
        "right": straight & narrow & sideways & (net[:, 0] > 0),
        "left": straight & narrow & sideways & (net[:, 0] < 0),
        "up": straight & narrow & ~sideways & (net[:, 1] < 0),
        "down": straight & narrow & ~sideways & (net[:, 1] > 0),
        "grow": (growth > 0.8) & (along < 0.25),
        "shrink": (growth < -0.8) & (along < 0.25),
        "still": steady & quiet,
        "circle": steady & (reach.amin(-1) > 0.26),
        "bounce": steady & (reach[:, 0] < 0.2) & (reach[:, 1] > 0.22),
    }
    motion = torch.full_like(sideways, NOTHING, dtype=torch.long)
    for name, holds in rules.items():
        motion[holds] = world.MOTIONS.index(name)
    return motion


def look(video: Tensor) -> Seen:
    """video [B, 3, T, H, W] in 0..1 → what each clip shows."""
    video = video.float().clamp(0, 1)
    border = border_colour(video)
    mask = object_mask(video, border)
    area, centroid = measure(mask)
    outlines, unit, grounds = _templates(video.device)

    mine = outline(mask, area, centroid)[:, None]
    overlap = torch.minimum(mine, outlines).sum((-1, -2))
    overlap = overlap / torch.maximum(mine, outlines).sum((-1, -2)).clamp(min=1e-6)
    score, shape = overlap.max(1)

    # Frames 0, 4, 8, … are enough for a median colour.
    pixels = video[:, :, ::4].flatten(2)
    seen = _median(pixels, mask[:, ::4].flatten(1))
    table = torch.tensor(list(world.COLOURS.values()), device=video.device)
    gap, colour = torch.cdist(seen.nan_to_num(-9.0), table * 0.96).min(1)

    radius = (area.clamp(min=1e-6) / unit[shape, None]).sqrt().log().mean(1).exp()
    size = (radius > (world.RADIUS[0] * world.RADIUS[1]) ** 0.5).long()
    ground = torch.cdist(border, grounds).argmin(1)
    motion = read_motion(area, centroid)

    present = area.amin(1) > 0.01  # in every frame, at least a dot of 14 x 14 pixels in 256
    shape = torch.where(present & (score > 0.6), shape, NOTHING)
    colour = torch.where(present & (gap < 0.3), colour, NOTHING)
    return Seen(
        shape=shape,
        colour=colour,
        size=torch.where(present, size, NOTHING),
        motion=torch.where(present, motion, NOTHING),
        background=ground,
    )
