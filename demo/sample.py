"""Batched sampling with the demo model, step for step what diffusers' Wan pipelines do.

`generate` is the loop of WanPipeline, and of WanImageToVideoPipeline with `expand_timesteps` when
first latents are given; only the forward (see dit.py) and the decoding (whole_clip.py) are cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import dit
import models
import torch
import whole_clip
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel


@dataclass(frozen=True)
class Parts:
    """What a pipeline folder holds, on one device."""

    vae: AutoencoderKLWan
    transformer: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerFast

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The latents' mean and deviation [1, C, 1, 1, 1]."""
        config, device = self.vae.config, self.transformer.device
        shape = (1, -1, 1, 1, 1)
        return (
            torch.tensor(config.latents_mean, device=device).view(shape),
            torch.tensor(config.latents_std, device=device).view(shape),
        )


def token_ids(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """int64 [B, TEXT_LENGTH], 0 where padded."""
    found = tokenizer(prompts, padding="max_length", max_length=dit.TEXT_LENGTH)
    return torch.tensor(found["input_ids"])


def encode(parts: Parts, video: Tensor) -> Tensor:
    """video [B, 3, T, H, W] in 0..1 → normalised latents, the mode of the posterior."""
    mean, deviation = parts.statistics()
    latents, _ = whole_clip.encode(parts.vae, video * 2 - 1)
    return (latents.float() - mean) / deviation


def decode(parts: Parts, latents: Tensor) -> Tensor:
    """Normalised latents → video [B, 3, T, H, W] in 0..1."""
    mean, deviation = parts.statistics()
    video = whole_clip.decode(parts.vae, latents * deviation + mean)
    return (video.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def generate(
    parts: Parts,
    prompts: list[str],
    noise: Tensor,
    first: Tensor | None = None,
    scheduler: UniPCMultistepScheduler | None = None,
    block_step: object = dit.block_forward,
) -> Tensor:
    """noise [B, C, t, h, w]; first: latents [B, C, 1, h, w] of given first frames → latents."""
    scheduler = scheduler or models.build_scheduler()
    guidance = models.DEFAULTS["cfg"]
    scheduler.set_timesteps(models.DEFAULTS["steps"], device=noise.device)
    ids = token_ids(parts.tokenizer, prompts + [""] * len(prompts)).to(noise.device)
    text = dit.embed_text(parts.text_encoder, ids)
    latents = noise
    for t in scheduler.timesteps:
        given = latents if first is None else torch.cat([first, latents[:, :, 1:]], 2)
        times = t.float().expand(2 * len(prompts), 2).clone()
        if first is not None:
            times[:, 0] = 0
        both = dit.forward(parts.transformer, torch.cat([given, given]), times, text, block_step)
        told, untold = both.chunk(2)
        velocity = untold + guidance * (told - untold)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents if first is None else torch.cat([first, latents[:, :, 1:]], 2)
