"""Contact sheets: one clip a row, a few of its frames side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

SHOWN = (0, 4, 8, 12, 16)


def save_sheet(clips: list[Tensor], path: Path, columns: int = 2, side: int = 96) -> None:
    """clips: [3, T, H, W] in 0..1 each → a PNG, `columns` clips abreast, top to bottom first."""
    rows = []
    for clip in clips:
        frames = clip[:, [t for t in SHOWN if t < clip.shape[1]]].float().cpu()
        small = torch.nn.functional.interpolate(
            frames.transpose(0, 1), (side, side), mode="area"
        ).clamp(0, 1)
        rows.append(torch.nn.functional.pad(torch.cat(list(small), -1), (2, 2, 1, 1), value=1.0))
    height = -(-len(rows) // columns)
    rows += [torch.ones_like(rows[0])] * (height * columns - len(rows))
    parts = [torch.cat(rows[c * height : (c + 1) * height], 1) for c in range(columns)]
    pixels = (torch.cat(parts, 2).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path)
