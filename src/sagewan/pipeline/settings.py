"""Settings of the VAE and of CLIP's pictures that would only fail in the middle of a run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagewan.errors import CheckpointError


def check_vae(config: Mapping[str, Any], path: Path) -> None:
    """CheckpointError unless a VAE's config, with diffusers' defaults, agrees with itself: the mean
    and deviation of every channel, and how many pixels and frames make one latent."""
    for name in ("latents_mean", "latents_std"):
        values = config[name]
        if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
            raise CheckpointError(f"{path}: {name} is no list of numbers: fetch its config again")
        if len(values) != config["z_dim"]:
            raise CheckpointError(
                f"{path}: {name} has {len(values)} numbers for {config['z_dim']} channels: "
                "fetch its config again"
            )
    patch = 1 if config["patch_size"] is None else config["patch_size"]
    if type(patch) is not int or patch < 1:
        raise CheckpointError(f"{path}: patch_size is {patch!r}, no count: fetch its config again")
    halvings = config["temperal_downsample"]
    factors = {
        "scale_factor_spatial": patch * 2 ** len(halvings),
        "scale_factor_temporal": 2 ** sum(map(bool, halvings)),
    }
    for name, made in factors.items():
        if config[name] != made:
            raise CheckpointError(
                f"{path}: {name} is {config[name]!r}, and its layers make {made}: "
                "fetch its config again"
            )


def check_processor(processor: Any, image_size: int, path: Path | None) -> None:
    """CheckpointError unless the processor makes of any picture what CLIP takes. Whatever a library
    raises for settings of a wrong type is its own."""
    import numpy as np
    from PIL import Image

    picture = Image.new("RGB", (40, 30), "grey")
    with np.errstate(all="ignore"):
        tried = processor(images=[picture], return_tensors="pt").pixel_values
    if tuple(tried.shape) != (1, 3, image_size, image_size) or not bool(tried.isfinite().all()):
        raise CheckpointError(
            f"{path}: by its settings pictures become {list(tried.shape)}, and the image encoder "
            f"takes {[1, 3, image_size, image_size]} of finite numbers: fetch it again"
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
