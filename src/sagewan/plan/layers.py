"""The layers of a Wan transformer that multiply by a matrix, by diffusers' names."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from sagewan.plan.models import Model


class Role(Enum):
    """What a layer does: the first four are those of a block."""

    SELF_ATTENTION = "self-attention"
    CROSS_QUERY = "query and output of cross-attention"
    CROSS_KEY_VALUE = "keys and values of cross-attention"
    FEED_FORWARD = "feed-forward"
    TIME = "embedding of the time"
    OTHER = "outside the blocks"


@dataclass(frozen=True)
class Layer:
    """One matrix [outputs, inputs] of a block; ``name`` is diffusers', within the block."""

    name: str
    outputs: int
    inputs: int
    role: Role

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs


def block_layers(model: Model) -> tuple[Layer, ...]:
    """The matrices of one of the model's blocks; all its blocks have the same."""
    return tuple(_layers(model.heads * model.head_dim, model.ffn, pictures=model.image_encoder))


def role_of(name: str) -> Role:
    """What the layer of this name in a transformer does."""
    block = _IN_BLOCK.fullmatch(name)
    if block:
        return _ROLES.get(block[1], Role.OTHER)
    return Role.TIME if name.startswith("condition_embedder.time_") else Role.OTHER


def block_of(name: str) -> int | None:
    """The block that a layer is in, None for one outside."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else None


def layer_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """The shape of every matrix of every block, by its full name in the transformer."""
    layers = block_layers(model)
    return {
        f"blocks.{block}.{layer.name}": layer.shape
        for block in range(model.layers)
        for layer in layers
    }


def weight_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of the transformer's weights that follow from a model's values: all of its blocks,
    and most outside them. ``scale_shift_table`` is a weight by itself, the others are ``.weight``
    of the module that is named."""
    width = model.heads * model.head_dim
    norms: tuple[str, ...] = (
        "attn1.norm_q",
        "attn1.norm_k",
        "attn2.norm_q",
        "attn2.norm_k",
        "norm2",
    )
    norms += ("attn2.norm_added_k",) if model.image_encoder else ()
    shapes: dict[str, tuple[int, ...]] = dict(layer_shapes(model))
    for block in range(model.layers):
        shapes |= {f"blocks.{block}.{norm}": (width,) for norm in norms}
        shapes[f"blocks.{block}.scale_shift_table"] = (1, 6, width)
    return shapes | {
        "patch_embedding": (width, model.in_channels, *model.patch),
        "condition_embedder.time_embedder.linear_2": (width, width),
        "condition_embedder.time_proj": (6 * width, width),
        "condition_embedder.text_embedder.linear_2": (width, width),
        "proj_out": (model.latent_channels * math.prod(model.patch), width),
        "scale_shift_table": (1, 2, width),
    }


def _layers(width: int, ffn: int, *, pictures: bool) -> Iterator[Layer]:
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield Layer(f"attn1.{name}", width, width, Role.SELF_ATTENTION)
    for name in ("to_q", "to_out.0"):
        yield Layer(f"attn2.{name}", width, width, Role.CROSS_QUERY)
    for name in ("to_k", "to_v", *(("add_k_proj", "add_v_proj") if pictures else ())):
        yield Layer(f"attn2.{name}", width, width, Role.CROSS_KEY_VALUE)
    yield Layer("ffn.net.0.proj", ffn, width, Role.FEED_FORWARD)
    yield Layer("ffn.net.2", width, ffn, Role.FEED_FORWARD)


_BLOCK = re.compile(r"blocks\.(\d+)\.")
_IN_BLOCK = re.compile(r"blocks\.\d+\.(.+)")
_ROLES = {layer.name: layer.role for layer in _layers(1, 1, pictures=True)}
