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
        blocks = self.num_layers * self._block
        patch = math.prod(self.patch_size)
        embedding = _linear(self.in_channels * patch, self.width)
        output = _linear(self.width, self.out_channels * patch) + 2 * self.width
        return embedding + self._conditions + blocks + output

    @property
    def _conditions(self) -> int:
        width = self.width
        time = _linear(self.freq_dim, width) + _linear(width, width) + _linear(width, 6 * width)
        text = _linear(self.text_dim, width) + _linear(width, width)
        if self.image_dim is None:
            return time + text
        picture = _linear(self.image_dim, self.image_dim) + _linear(self.image_dim, width)
        norms = 2 * self.image_dim + 2 * width
        return time + text + picture + norms + (self.pos_embed_seq_len or 0) * self.image_dim

    @property
    def _block(self) -> int:
        width = self.width
        attention = 4 * _linear(width, width) + 2 * width  # q, k, v, out; the norms of q and k
        cross = attention
        if self.added_kv_proj_dim is not None:
            cross += 2 * _linear(self.added_kv_proj_dim, width) + width
        norm = 2 * width if self.cross_attn_norm else 0
        ffn = _linear(width, self.ffn_dim) + _linear(self.ffn_dim, width)
        return attention + cross + norm + ffn + 6 * width


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _is_sound(name: str, value: object) -> bool:
    if name == "cross_attn_norm":
        return isinstance(value, bool)
    if name == "patch_size":
        return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_count, value))
    return _is_count(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
