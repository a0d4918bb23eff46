"""From the configs of a model's parts to the values that a plan is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagewan.checkpoint.architecture import Architecture
from sagewan.errors import CheckpointError
from sagewan.plan.models import (
    FIRST_LAST_FRAME,
    IMAGE_TO_VIDEO,
    PUBLISHED,
    TEXT_TO_VIDEO,
    Model,
)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a model's parts say of it. ``config`` and ``vae_config`` are the files that are named
    where the values can't be; ``boundary`` is None for a model of one expert."""

    architecture: Architecture
    vae: Mapping[str, Any]
    expand_timesteps: bool
    boundary: float | None
    config: Path
    vae_config: Path


def model_of(traits: Traits, name: str) -> Model:
    """The model that these parts make, with the sampling of nobody yet."""
    architecture, vae = traits.architecture, traits.vae
    channels = _count(vae, "z_dim", 16, traits.vae_config)
    return Model(
        name=name,
        family="wan",
        tasks=_tasks(traits, channels),
        layers=architecture.num_layers,
        heads=architecture.num_attention_heads,
        head_dim=architecture.attention_head_dim,
        ffn=architecture.ffn_dim,
        in_channels=architecture.in_channels,
        latent_channels=channels,
        # Wan 2.1's VAE was published before its config held the factors: these are its own.
        spatial=_count(vae, "scale_factor_spatial", 8, traits.vae_config),
        temporal=_count(vae, "scale_factor_temporal", 4, traits.vae_config),
        patch=architecture.patch_size,
        image_encoder=architecture.image_dim is not None,
        expand_timesteps=traits.expand_timesteps,
        experts=1 if traits.boundary is None else 2,
        boundary=traits.boundary,
        parameters=architecture.parameters,
    )


def nearest(model: Model) -> Model:
    """The published model most like this one: first in what it does, then in size."""

    def distance(published: Model) -> tuple[int, float]:
        traits = ("tasks", "experts", "image_encoder", "expand_timesteps")
        differing = sum(getattr(published, name) != getattr(model, name) for name in traits)
        return differing, abs(published.parameters - model.parameters)

    return min(PUBLISHED.values(), key=distance)


def is_published(model: Model, published: Model) -> bool:
    """Whether a model has the very size of a published one."""
    return published.parameters == model.parameters and published.layers == model.layers


def _tasks(traits: Traits, channels: int) -> tuple[str, ...]:
    """The tasks follow from the channels the transformer takes: the noisy latents alone, or
    with the latents of a picture and the mask (one channel for each of 4 frames) beside them."""
    architecture = traits.architecture
    if traits.expand_timesteps:
        return (TEXT_TO_VIDEO, IMAGE_TO_VIDEO)
    if architecture.in_channels == channels:
        return (TEXT_TO_VIDEO,)
    if architecture.in_channels != 2 * channels + 4:
        raise CheckpointError(
            f"{traits.config}: in_channels is "
            f"{architecture.in_channels}; beside a VAE of {channels} channels Wan takes "
            f"{channels} (text to video) or {2 * channels + 4} (image to video)"
        )
    if architecture.image_dim is None:
        return (IMAGE_TO_VIDEO, FIRST_LAST_FRAME)
    # The table of positions spans the tokens of both pictures: such a model can't take one.
    return (IMAGE_TO_VIDEO,) if architecture.pos_embed_seq_len is None else (FIRST_LAST_FRAME,)


def _count(config: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}, which is no count")
    return value
