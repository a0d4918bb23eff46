"""Reads a clip's pixels and says what it shows: how many objects, and of each its shape, colour,
size and motion; and the background.

It knows nothing of the model. An object is whatever is not the background's colour, lit or in
shadow. Two objects are told apart by empty columns between them, so the left one is the first.
An object's area and centroid over time give the motion; its outline (moved to its centroid and
scaled to equal area) gives the shape, by overlap with the six of :mod:`sagewan.evaluate.world`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.evaluate import world

NOTHING = -1  # an attribute that fits none of the names
CELLS = 40  # side of the normalised outline
SPAN = 1.25  # half its width, in square roots of the object's area
SIDE, STRIDES = 256, 16  # a larger clip is looked at in this size, a longer one in 17 frames
GAP = 5  # pixels; narrower gaps do not part an object, narrower pieces are none
PAIR_SCALE = 0.75  # two objects have less room to move
MOST = 0.75  # the share of frames in which an object must hang together


@dataclass(frozen=True)
class Seen:
    """What B clips show. count int64 [B]: objects, 1 or 2, or NOTHING; shape, colour, size, motion
    int64 [B, 2]: indices into the world's tables, or NOTHING; background int64 [B]."""

    count: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    motion: Tensor
    background: Tensor

    def right(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bool [B] for the count, and for each attribute in ``wanted``: int64 [B, K] indices for
        K objects from left to right (size is no attribute of two), ``background`` [B]."""
        objects = wanted["shape"].shape[1]
        hits = {"count": self.count == objects}
        for name in (*world.OF_OBJECT, "background"):
            if name not in wanted or (name == "size" and objects > 1):
                continue
            aim = wanted[name].to(self.count.device)
            seen = getattr(self, name)
            hits[name] = seen == aim if name == "background" else (seen[:, :objects] == aim).all(1)
        return hits


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


def _occupied(mask: Tensor, axis: int) -> Tensor:
    """bool [B, T, N]: columns (axis -2 summed) or rows (-1) that hold some of the mask, without
    narrow gaps and narrow pieces."""
    held = mask.any(axis).float()
    for sign in (1, -1, -1, 1):  # fill gaps: grow, shrink; drop pieces: shrink, grow
        held = sign * F.max_pool1d(sign * held, GAP, 1, GAP // 2)
    return held > 0.5


def _pieces(occupied: Tensor) -> Tensor:
    """int64 [B, T]: runs of true along the last axis."""
    return (F.pad(occupied, (1, 0))[..., :-1] < occupied).sum(-1)


def separate(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask bool [B, T, H, W] → the number of objects int64 [B], or NOTHING, and the masks of the
    first and second [B, 2, T, H, W]; where one object is seen the first is all and the second
    empty."""
    columns = _occupied(mask, -2)
    pieces = _pieces(columns)
    index = torch.arange(mask.shape[-1], device=mask.device)
    after = columns.int().cumsum(-1) > 0
    before = columns.flip(-1).int().cumsum(-1).flip(-1) > 0
    gap = ~columns & after & before
    middle = (gap * index).sum(-1) / gap.sum(-1).clamp(min=1)
    parted = pieces == 2
    usual = torch.where(parted, middle, 0).sum(1) / parted.sum(1).clamp(min=1)
    middle = torch.where(parted, middle, usual[:, None])

    two = parted.float().mean(1) >= MOST
    left = (index <= middle[..., None])[:, :, None] | ~two[:, None, None, None]
    masks = torch.stack([mask & left, mask & ~left], 1)
    whole = (_pieces(_occupied(masks.flatten(0, 1), -1)) == 1).float().mean(1) >= MOST
    whole = whole.view(-1, 2)
    one = (pieces == 1).float().mean(1) >= MOST
    count = torch.full_like(pieces[:, 0], NOTHING)
    count[one & whole[:, 0]] = 1
    count[two & whole.all(1)] = 2
    return count, masks


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
def _templates(device: torch.device) -> tuple[Tensor, Tensor]:
    """Outlines [6, CELLS, CELLS] and areas of a unit radius [6], drawn at half the picture."""
    axis = ((torch.arange(SIDE, device=device) + 0.5) * 2 / SIDE - 1) / 0.5
    shapes = torch.arange(len(world.SHAPES), device=device)
    x = axis.view(1, 1, 1, -1).expand(len(shapes), 1, SIDE, SIDE)
    mask = world.distances(x, axis.view(1, 1, -1, 1), shapes) < 0
    area, centroid = measure(mask)
    return outline(mask, area, centroid), area[:, 0] / 0.5**2


def read_motion(area: Tensor, centroid: Tensor, scale: Tensor) -> Tensor:
    """area [B, T], centroid [B, T, 2] → int64 [B] index of the motion, or NOTHING. ``scale`` [B] is
    how far objects move, as a share of how far one alone does."""
    ends = slice(0, 2), slice(-2, None)
    first, last = (centroid[:, e].mean(1) / scale[:, None] for e in ends)
    net = last - first
    reach = (centroid.amax(1) - centroid.amin(1)) / scale[:, None]
    growth = (area[:, ends[1]].mean(1) / area[:, ends[0]].mean(1).clamp(min=1e-6)).log()
    across, along = net.abs().min(-1).values, net.abs().max(-1).values
    sideways = net[:, 0].abs() > net[:, 1].abs()
    straight = (along > 0.3) & (across < 0.15) & (growth.abs() < 0.45)
    narrow = torch.where(sideways, reach[:, 1], reach[:, 0]) < 0.2
    steady = (growth.abs() < 0.45) & (along < 0.2)
    rules = {
        "right": straight & narrow & sideways & (net[:, 0] > 0),
        "left": straight & narrow & sideways & (net[:, 0] < 0),
        "up": straight & narrow & ~sideways & (net[:, 1] < 0),
        "down": straight & narrow & ~sideways & (net[:, 1] > 0),
        "grow": (growth > 0.65) & (along < 0.25),
        "shrink": (growth < -0.65) & (along < 0.25),
        "still": steady & (reach.amax(-1) < 0.15),
        "orbit": steady & (reach.amin(-1) > 0.22),
        "bounce": steady & (reach[:, 0] < 0.18) & (reach[:, 1] > 0.22),
    }
    motion = torch.full_like(sideways, NOTHING, dtype=torch.long)
    for name, holds in rules.items():
        motion[holds] = world.MOTIONS.index(name)
    return motion


def _read_object(video: Tensor, mask: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """video [B, 3, T, H, W], mask [B, T, H, W] → each attribute of one object, int64 [B]."""
    area, centroid = measure(mask)
    outlines, unit = _templates(video.device)
    mine = outline(mask, area, centroid)[:, None]
    overlap = torch.minimum(mine, outlines).sum((-1, -2))
    overlap = overlap / torch.maximum(mine, outlines).sum((-1, -2)).clamp(min=1e-6)
    score, shape = overlap.max(1)
    # Frames 0, 4, 8, … are enough for a median colour.
    seen = _median(video[:, :, ::4].flatten(2), mask[:, ::4].flatten(1))
    table = torch.tensor(list(world.COLOURS.values()), device=video.device)
    gap, colour = torch.cdist(seen.nan_to_num(-9.0), table * 0.96).min(1)
    radius = (area.clamp(min=1e-6) / unit[shape, None]).sqrt().log().mean(1).exp()
    size = (radius > (world.RADIUS[0] * world.RADIUS[1]) ** 0.5).long()
    present = area.amin(1) > 0.01  # in every frame, at least a dot of 14 x 14 pixels in 256
    return {
        "shape": torch.where(present & (score > 0.6), shape, NOTHING),
        "colour": torch.where(present & (gap < 0.3), colour, NOTHING),
        "size": torch.where(present, size, NOTHING),
        "motion": torch.where(present, read_motion(area, centroid, scale), NOTHING),
    }


def look(video: Tensor) -> Seen:
    """video [B, 3, T, H, W] in 0..1, square → what each clip shows."""
    stride = max(1, (video.shape[2] - 1) // STRIDES)
    video = video[:, :, ::stride].float().clamp(0, 1)
    if video.shape[-1] > SIDE:
        frames = video.shape[2]
        flat = F.interpolate(video.transpose(1, 2).flatten(0, 1), (SIDE, SIDE), mode="area")
        video = flat.unflatten(0, (-1, frames)).transpose(1, 2)
    border = border_colour(video)
    count, masks = separate(object_mask(video, border))
    scale = torch.where(count == 2, PAIR_SCALE, 1.0)
    objects = [_read_object(video, masks[:, number], scale) for number in range(2)]
    grounds = torch.tensor(list(world.BACKGROUNDS.values()), device=video.device) * 0.95
    return Seen(
        count=count,
        background=torch.cdist(border, grounds).argmin(1),
        **{name: torch.stack([o[name] for o in objects], 1) for name in world.OF_OBJECT},
    )


def shown(seen: Seen, clip: int) -> str:
    """One clip in words, such as "red ball right, blue star grow on navy"; ? for nothing known."""
    objects = []
    for number in range(max(1, int(seen.count[clip]))):
        words = []
        for field in fields(seen):
            if field.name in world.OF_OBJECT:
                index = int(getattr(seen, field.name)[clip, number])
                words.append("?" if index == NOTHING else world.NAMES[field.name][index])
        objects.append(" ".join(words))
    ground = world.NAMES["background"][int(seen.background[clip])]
    return f"{', '.join(objects)} on {ground}"
