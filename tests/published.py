"""The configs of the published models, as their diffusers repositories on the hub have them."""

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_CLIP = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {
        **_COMMON,
        "num_attention_heads": 12,
        "num_layers": 30,
        "ffn_dim": 8960,
    },
    "wan2.1-t2v-14b": {**_COMMON, **_14B},
    "wan2.1-i2v-14b": {**_COMMON, **_14B, **_CLIP},
    "wan2.1-flf2v-14b": {**_COMMON, **_14B, **_CLIP, "pos_embed_seq_len": 514},
    "wan2.2-t2v-a14b": {**_COMMON, **_14B},
    "wan2.2-i2v-a14b": {**_COMMON, **_14B, "in_channels": 36},
    "wan2.2-ti2v-5b": {
        **_COMMON,
        "num_attention_heads": 24,
        "num_layers": 30,
        "ffn_dim": 14336,
        "in_channels": 48,
        "out_channels": 48,
    },
}

_VAE_2_1: dict[str, Any] = {
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_VAE_2_2: dict[str, Any] = {
    **_VAE_2_1,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "is_residual": True,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "z_dim": 48,
}
VAES: dict[str, dict[str, Any]] = {
    name: _VAE_2_2 if name == "wan2.2-ti2v-5b" else _VAE_2_1 for name in TRANSFORMERS
}

# model_index.json: what the pipeline is told beside its components.
PIPELINES: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"_class_name": "WanPipeline"},
    "wan2.1-t2v-14b": {"_class_name": "WanPipeline"},
    "wan2.1-i2v-14b": {"_class_name": "WanImageToVideoPipeline"},
    "wan2.1-flf2v-14b": {"_class_name": "WanImageToVideoPipeline"},
    "wan2.2-t2v-a14b": {"_class_name": "WanPipeline", "boundary_ratio": 0.875},
    "wan2.2-i2v-a14b": {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9},
    "wan2.2-ti2v-5b": {"_class_name": "WanPipeline", "expand_timesteps": True},
}


def write_folder(name: str, folder: Path) -> Path:
    """A folder with the published configs at full size, and weight files that hold no tensors."""
    index = {**PIPELINES[name], "vae": ["diffusers", "AutoencoderKLWan"]}
    config = TRANSFORMERS[name]
    transformer = {"_class_name": "WanTransformer3DModel", **config}
    names = ["transformer", *(["transformer_2"] if "boundary_ratio" in index else [])]
    for component in names:
        _write(folder / component / "config.json", transformer)
        empty_weights(folder / component / "diffusion_pytorch_model.safetensors")
    index |= {component: ["diffusers", "WanTransformer3DModel"] for component in names}
    _write(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan", **VAES[name]})
    empty_weights(folder / "vae" / "diffusion_pytorch_model.safetensors")
    _write(folder / "text_encoder" / "config.json", {"model_type": "umt5", "d_model": 4096})
    empty_weights(folder / "text_encoder" / "model.safetensors")
    _write(folder / "tokenizer" / "tokenizer.json", {})
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["image_encoder"] = [None, None]
    if config["image_dim"] is not None:
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        _write(folder / "image_encoder" / "config.json", {"model_type": "clip_vision_model"})
        empty_weights(folder / "image_encoder" / "model.safetensors")
        _write(folder / "image_processor" / "preprocessor_config.json", {})
    _write(folder / "model_index.json", index)
    return folder


def empty_weights(path: Path, **tensors: int) -> None:
    """A whole safetensors file with float32 vectors of these lengths, all zero."""
    header, end = {}, 0
    for name, length in tensors.items():
        place = [end, end + 4 * length]
        header[name] = {"dtype": "F32", "shape": [length], "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
