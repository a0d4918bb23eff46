"""Latents → a small moving picture, by a linear map: cheap enough for every step.

A latent's channels mix colour with much else, but the mean colour of the pixels it stands for is
nearly linear in them. The map is fitted to the VAE itself: it encodes some smooth random pictures,
and least squares finds the colours in the latents. Once a VAE; the result is kept in the cache.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagewan.cache import cache_folder
from sagewan.errors import RequestError
from sagewan.pipeline.build import Components
from sagewan.pipeline.conditions import normalized
from sagewan.pipeline.files import written_whole
from sagewan.plan.plan import Plan

logger = logging.getLogger(__name__)

# 16 pictures of 8×8 latents, twice for two latent frames: some 2,000 equations for at most 49
# unknowns a colour.
_PICTURES, _SIDE, _BLOBS = 16, 8, 3
_WEBP = {"quality": 80, "method": 2, "loop": 0}


@dataclass(frozen=True)
class LatentColours:
    """``weights`` [C + 1, 3] float32 on the CPU, the last row a constant: latents → RGB, 0 … 1."""

    weights: Tensor

    def frames(self, latents: Tensor) -> Tensor:
        """Latents [1, C, F, H, W] of any dtype and device → uint8 [F, H, W, 3] on the CPU."""
        values = latents[0].float().cpu().permute(1, 2, 3, 0)
        colours = values @ self.weights[:-1] + self.weights[-1]
        return (colours.clamp(0, 1).nan_to_num(0) * 255).round().to(torch.uint8)


@torch.inference_mode()
def fit_colours(vae: Any, spatial: int) -> LatentColours:
    """The map of a VAE whose latents stand for ``spatial``×``spatial`` pixels."""
    features, colours = [], []
    for pixels in _pictures(spatial):
        video = pixels[None, :, None].expand(-1, -1, 5, -1, -1)
        mode = vae.encode((video * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        latents = normalized(mode, vae)[0].float().cpu()
        means = torch.nn.functional.avg_pool2d(pixels, spatial)
        for frame in latents.unbind(1):
            features.append(frame.flatten(1).T)
            colours.append(means.flatten(1).T)
    inputs = torch.cat(features)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    return LatentColours(torch.linalg.lstsq(inputs, torch.cat(colours)).solution)


def _pictures(spatial: int) -> Iterator[Tensor]:
    """Smooth random colour fields, float32 [3, H, W] in 0 … 1, the same ones every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    side = spatial * _SIDE
    for _ in range(_PICTURES):
        blobs = torch.randn(1, 3, _BLOBS, _BLOBS, generator=generator) * 1.5
        smooth = torch.nn.functional.interpolate(blobs, (side, side), mode="bicubic")
        yield smooth[0].sigmoid()


@dataclass(frozen=True)
class Preview:
    """Latents → WebP. ``milliseconds`` is how long one latent frame stands."""

    colours: LatentColours
    milliseconds: int

    def __call__(self, latents: Tensor) -> bytes:
        from PIL import Image

        first, *others = (Image.fromarray(frame.numpy()) for frame in self.colours.frames(latents))
        file = io.BytesIO()
        first.save(
            file,
            "WEBP",
            save_all=True,
            append_images=others,
            duration=self.milliseconds,
            **_WEBP,
        )
        return file.getvalue()


def preview_of(components: Components, plan: Plan) -> Preview:
    """What draws the previews of a run."""
    path = cache_folder() / "previews" / f"{_identity(plan)}.json"
    colours = _stored(path)
    if colours is None:
        with components.vae.on(plan.device.torch_name) as vae:
            colours = fit_colours(vae, plan.model.spatial)
        _store(path, colours)
    return Preview(colours, round(1000 * plan.model.temporal / plan.fps))


def _stored(path: Path) -> LatentColours | None:
    try:
        return LatentColours(torch.tensor(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return None


def _store(path: Path, colours: LatentColours) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(colours.weights.tolist()), encoding="utf-8")
    except (OSError, RequestError) as error:
        logger.warning("the colours of the previews were not stored: %s", error)


def _identity(plan: Plan) -> str:
    """A name for the VAE of a model: another file, size or date is another VAE."""
    location = plan.model.location
    assert location is not None
    folder = location / "vae" if (location / "vae").is_dir() else location
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
