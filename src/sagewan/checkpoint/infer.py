"""What a part is, from the shapes of its weights, where no config lies beside them.

The values are those of the diffusers and transformers configs. What shapes don't tell (heads, the
VAE's statistics) is what Wan's own models have.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sagewan.checkpoint.roles import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER, VAE
from sagewan.checkpoint.source import Entry, Source
from sagewan.checkpoint.tensors import TensorFile
from sagewan.errors import CheckpointError

# Every Wan model's.
HEAD_DIM = 128

# The mean and deviation of the 48 channels of Wan 2.2's VAE, which its weights do not hold
# (github.com/Wan-Video/Wan2.2, wan/modules/vae2_2.py); those of the 16 are diffusers' default.
_MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# Which config a part's is, by its class or type.
_OF_PART = {
    TRANSFORMER: ("_class_name", "WanTransformer3DModel"),
    VAE: ("_class_name", "AutoencoderKLWan"),
    TEXT_ENCODER: ("model_type", "umt5"),
    IMAGE_ENCODER: ("model_type", "clip_vision_model"),
}
_IN_BLOCK = re.compile(r"\.\d+\.")
# CLIP's heads by its width: ViT-H/14's.
_CLIP_HEADS = {1280: 16}


def config_of(source: Source) -> dict[str, Any]:
    """The part's config, by diffusers' or transformers' keys: the one beside its weights if it is
    this part's, else the one that their shapes tell. Raises CheckpointError if they tell none."""
    key, kind = _OF_PART[source.role]
    if source.config is not None and source.config.get(key) == kind:
        return dict(source.config)
    infer = {
        TRANSFORMER: _transformer,
        VAE: _vae,
        TEXT_ENCODER: _text_encoder,
        IMAGE_ENCODER: _image_encoder,
    }[source.role]
    try:
        return {key: kind, **infer(source)}
    except CheckpointError:
        raise
    except (IndexError, ValueError, ZeroDivisionError):
        raise CheckpointError(
            f"{source.path}: its weights have shapes that no {source.role.replace('_', ' ')} of "
            "Wan has: fetch it again, or choose another file"
        ) from None


def _transformer(source: Source) -> dict[str, Any]:
    width, channels, *patch = _shape(source, "patch_embedding.weight", 5)
    if width % HEAD_DIM:
        raise ValueError(width)
    out, _ = _shape(source, "proj_out.weight", 2)
    picture = source.shape("condition_embedder.image_embedder.norm1.weight")
    picture_keys = source.shape("blocks.0.attn2.add_k_proj.weight")
    positions = source.shape("condition_embedder.image_embedder.pos_embed")
    return {
        "patch_size": patch,
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": out // (patch[0] * patch[1] * patch[2]),
        "text_dim": _shape(source, "condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": _shape(source, "condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": _shape(source, "blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": _count(source, r"blocks\.(\d+)\..+"),
        "cross_attn_norm": source.shape("blocks.0.norm2.weight") is not None,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
        "image_dim": picture[0] if picture else None,
        "added_kv_proj_dim": picture_keys[1] if picture_keys else None,
        "pos_embed_seq_len": math.prod(positions) // picture[0] if positions and picture else None,
    }


def _vae(source: Source) -> dict[str, Any]:
    channels = _shape(source, "post_quant_conv.weight", 5)[0]
    residual = source.shape("encoder.down_blocks.0.resnets.0.conv1.weight") is not None
    base, incoming, *_ = _shape(source, "encoder.conv_in.weight", 5)
    config: dict[str, Any] = {
        "z_dim": channels,
        "base_dim": base,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": _count(source, r"decoder\.up_blocks\.0\.resnets\.(\d+)\..+") - 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    }
    if channels not in (16, 48):
        raise CheckpointError(
            f"{source.path} is a VAE of {channels} channels, whose statistics only its config.json "
            "tells: put it beside the weights"
        )
    if channels == 48:
        config |= {"latents_mean": list(_MEAN_48), "latents_std": list(_STD_48)}
    if residual:
        config |= {
            "is_residual": True,
            "decoder_base_dim": _shape(source, "decoder.conv_in.weight", 5)[0] // 4,
            "in_channels": incoming,
            "out_channels": _shape(source, "decoder.conv_out.weight", 5)[0],
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
        }
    return config


def _text_encoder(source: Source) -> dict[str, Any]:
    block = "encoder.block.0.layer."
    vocabulary, width = _shape(source, "shared.weight", 2)
    buckets, heads = _shape(source, f"{block}0.SelfAttention.relative_attention_bias.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(source, f"{block}0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": _shape(source, f"{block}1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": _count(source, r"encoder\.block\.(\d+)\..+"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
    }


def _image_encoder(source: Source) -> dict[str, Any]:
    width, _, patch, _ = _shape(source, "embeddings.patch_embedding.weight", 4)
    positions = math.prod(source.shape("embeddings.position_embedding.weight") or ()) // width
    if width not in _CLIP_HEADS:
        raise CheckpointError(
            f"{source.path} is a CLIP of {width} features, whose heads only its config.json tells: "
            "put it beside the weights"
        )
    return {
        "hidden_size": width,
        "intermediate_size": _shape(source, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(source, r"encoder\.layers\.(\d+)\..+"),
        "num_attention_heads": _CLIP_HEADS[width],
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _shape(source: Source, name: str, sides: int) -> tuple[int, ...]:
    shape = source.shape(name)
    if shape is None:
        raise CheckpointError(
            f"{source.path} lacks {name}, so that its size can't be told: fetch it again"
        )
    if len(shape) != sides or 0 in shape:
        raise CheckpointError(
            f"{source.path}: {name} has the shape {list(shape)}, which it has in no Wan model: "
            "fetch it again"
        )
    return shape


def _count(source: Source, pattern: str) -> int:
    """How many there are, by the numbers in the names of the entries."""
    numbers = {int(found[1]) for name in source.entries if (found := re.fullmatch(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        missing = min(set(range(max(numbers, default=0) + 1)) - numbers)
        raise CheckpointError(
            f"{source.path} lacks number {missing} of {len(numbers) + 1} or more blocks: "
            "fetch it again"
        )
    return len(numbers)


def main_format(source: Source) -> str:
    """The format that most of the numbers in the matrices of its blocks are in: a small model's
    blocks in 4 bits may take fewer bytes than the two that keep 16."""
    entries = source.entries.values()
    matrices = [one for one in entries if len(one.shape) == 2 and _IN_BLOCK.search(one.name)]
    numbers = Counter[str]()
    for one in matrices or entries:
        numbers[one.format] += math.prod(one.shape)
    return next((format_ for format_, _ in numbers.most_common(1)), "nothing")


def quantized_as(source: Source) -> str | None:
    """The format of the matrices of its blocks if they are packed, None if they are plain."""
    packed = [one for one in source.entries.values() if one.weight.is_packed]
    main = main_format(source)
    return main if any(one.format == main for one in packed) else None


def main_dtypes(parts: Mapping[str, Iterable[TensorFile]]) -> dict[str, str]:
    """What most bytes of each part are stored in, by torch's name or GGUF's."""
    found = {}
    for part, files in parts.items():
        sizes = Counter[str]()
        for stored in (one for file in files for one in file.tensors.values()):
            sizes[stored.dtype] += stored.nbytes
        if sizes:
            found[part] = sizes.most_common(1)[0][0]
    return found


def formats(entries: Iterable[Entry]) -> dict[str, int]:
    """Bytes by format, the most first."""
    found: dict[str, int] = {}
    for entry in entries:
        found[entry.format] = found.get(entry.format, 0) + entry.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))
