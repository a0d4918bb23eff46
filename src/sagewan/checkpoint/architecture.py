"""The shape of a Wan transformer, read from its config, and the parameters it has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagewan.errors import CheckpointError

# What diffusers' WanTransformer3DModel takes for a key that its config leaves out.
_DEFAULTS: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A WanTransformer3DModel's config, by diffusers' names; ``patch_size`` is (frames, rows,
    columns). ``image_dim`` and ``added_kv_proj_dim`` belong to Wan 2.1's CLIP pictures, and
    ``pos_embed_seq_len`` to the two pictures of its first-last-frame model."""

    patch_size: tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool
    image_dim: int | None
    added_kv_proj_dim: int | None
    pos_embed_seq_len: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], path: Path) -> "Architecture":
        """The architecture a config describes; CheckpointError, naming ``path``, if it is none."""
        found: dict[str, Any] = {}
        for name, default in _DEFAULTS.items():
            value = config.get(name)
            if value is not None and not _is_sound(name, value):
                raise CheckpointError(f"{path}: {name} is {value!r}, which is no size of a model")
            found[name] = default if value is None else value
        return cls(**{**found, "patch_size": tuple(found["patch_size"])})

    @property
    def width(self) -> int:
        """Features of one token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def parameters(self) -> int:
        """Every trained number of the transformer."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the transformer by diffusers' name, with its shape."""
        found = self._conditions()
        found["patch_embedding.weight"] = (self.width, self.in_channels, *self.patch_size)
        found["patch_embedding.bias"] = (self.width,)
        found["scale_shift_table"] = (1, 2, self.width)
        found |= _linear("proj_out", self.width, self.out_channels * math.prod(self.patch_size))
        block = self._block()
        for layer in range(self.num_layers):
            found |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        return found

    def _conditions(self) -> dict[str, tuple[int, ...]]:
        width = self.width
        found = {
            **_linear("time_embedder.linear_1", self.freq_dim, width),
            **_linear("time_embedder.linear_2", width, width),
            **_linear("time_proj", width, 6 * width),
            **_linear("text_embedder.linear_1", self.text_dim, width),
            **_linear("text_embedder.linear_2", width, width),
        }
        if self.image_dim is not None:
            found |= {
                **_norm("image_embedder.norm1", self.image_dim),
                **_linear("image_embedder.ff.net.0.proj", self.image_dim, self.image_dim),
                **_linear("image_embedder.ff.net.2", self.image_dim, width),
                **_norm("image_embedder.norm2", width),
            }
            if self.pos_embed_seq_len:
                found["image_embedder.pos_embed"] = (1, self.pos_embed_seq_len, self.image_dim)
        return {f"condition_embedder.{name}": shape for name, shape in found.items()}

    def _block(self) -> dict[str, tuple[int, ...]]:
        width = self.width
        found: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 6, width)}
        for attention in ("attn1", "attn2"):
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                found |= _linear(f"{attention}.{layer}", width, width)
            found |= {f"{attention}.norm_{which}.weight": (width,) for which in "qk"}
        if self.added_kv_proj_dim is not None:
            for layer in ("add_k_proj", "add_v_proj"):
                found |= _linear(f"attn2.{layer}", self.added_kv_proj_dim, width)
            found["attn2.norm_added_k.weight"] = (width,)
        if self.cross_attn_norm:
            found |= _norm("norm2", width)
        return (
            found
            | _linear("ffn.net.0.proj", width, self.ffn_dim)
            | _linear("ffn.net.2", self.ffn_dim, width)
        )


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _is_sound(name: str, value: object) -> bool:
    if name == "cross_attn_norm":
        return isinstance(value, bool)
    if name == "patch_size":
        return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_count, value))
    return _is_count(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
