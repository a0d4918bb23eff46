"""The demo model's parts and the diffusers folder they are saved in."""

from __future__ import annotations

import json
from pathlib import Path

import captions
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizer import build_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

from sagewan.evaluate.world import MOTIONS

LATENT_CHANNELS = 24
SHIFT = 3.0
LONG_SHIFT = 12.0  # 8,400 tokens repeat what 320 say, so noise must be higher to hide as much
DEFAULTS = {
    "family": "demo",
    "width": 256,
    "height": 256,
    "frames": 17,
    "fps": 12,
    "steps": 16,
    "cfg": 2.5,
    "shift": SHIFT,
    "scheduler": "unipc",
    "taught": {"objects": 2, "motions": MOTIONS},
}


def build_vae() -> AutoencoderKLWan:
    """The Wan 2.2 kind of autoencoder: 16 x 16 pixels x 4 frames become one latent."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer(layers: int = 8) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=128,
        ffn_dim=896,
        num_layers=layers,
    )


def build_text_encoder(words: int) -> UMT5EncoderModel:
    """words: size of the tokenizer's table, rounded up to a multiple of 8 here."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=-(-words // 8) * 8,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_layers=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_scheduler(shift: float = SHIFT) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        num_train_timesteps=1000,
    )


def save_folder(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
) -> None:
    """Write the whole pipeline in 16 bit: the VAE as fp16, the rest as bf16, no file over 16 MB."""
    # What diffusers keeps in float32 when it loads in bf16 is stored in float32 too.
    keep = WanTransformer3DModel._keep_in_fp32_modules  # noqa: SLF001
    for name, parameter in transformer.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=vae.to(torch.float16),
        scheduler=build_scheduler(),
        transformer=transformer,
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=True,
    )
    pipeline.save_pretrained(folder, max_shard_size="12MB")
    write = {"ensure_ascii": False, "indent": 1}
    vocabulary = json.dumps(captions.vocabulary(), **write)
    (folder / "vocabulary.json").write_text(vocabulary + "\n", encoding="utf-8")
    defaults = json.dumps(DEFAULTS, indent=1)
    (folder / "sagewan.json").write_text(defaults + "\n", encoding="utf-8")
