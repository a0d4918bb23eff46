"""Batched sampling with the demo model, step for step what diffusers' Wan pipelines do.

`generate` is the loop of WanPipeline, and of WanImageToVideoPipeline with `expand_timesteps` when
first latents are given; only the forward (see dit.py) and the decoding (whole_clip.py) are cheaper.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import dit
import models
import torch
import whole_clip
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel


@dataclass(frozen=True)
class Parts:
    """What a pipeline folder holds, on one device."""

    vae: AutoencoderKLWan
    transformer: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerFast

    def to(self, device: str) -> Parts:
        moved = (part.to(device) for part in (self.vae, self.transformer, self.text_encoder))
        return Parts(*moved, self.tokenizer)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The latents' mean and deviation [1, C, 1, 1, 1]."""
        config, device = self.vae.config, self.transformer.device
        shape = (1, -1, 1, 1, 1)
        return (
            torch.tensor(config.latents_mean, device=device).view(shape),
            torch.tensor(config.latents_std, device=device).view(shape),
        )


def load(folder: Path, device: str, dtype: torch.dtype) -> Parts:
    """The parts of a pipeline folder; the autoencoder always in float32."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=dtype)
    parts = Parts(
        pipeline.vae.to(torch.float32),
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.tokenizer,
    )
    return parts.to(device)


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


@dataclass(frozen=True)
class Sampling:
    """How to sample; without guidance (cfg 1) the transformer is not asked about no prompt."""

    steps: int = models.DEFAULTS["steps"]
    cfg: float = models.DEFAULTS["cfg"]
    shift: float = models.SHIFT
    scheduler: str = "unipc"

    def start(self, device: torch.device) -> UniPCMultistepScheduler:
        """A scheduler set to its first step: "unipc" as diffusers has it, or "euler" on n even
        steps from 1, shifted, which is what distilled models are taught."""
        if self.scheduler == "unipc":
            scheduler = models.build_scheduler(self.shift)
            scheduler.set_timesteps(self.steps, device=device)
            return scheduler
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        levels = [1 - step / self.steps for step in range(self.steps)]
        scheduler.set_timesteps(sigmas=levels, device=device)
        return scheduler


def default_sampling(folder: Path) -> Sampling:
    """What the model's `sagewan.json` says."""
    facts = json.loads((folder / "sagewan.json").read_text())
    return Sampling(**{f.name: facts[f.name] for f in fields(Sampling)})


def velocity(
    parts: Parts,
    latents: Tensor,
    time: Tensor,
    text: tuple[Tensor, Tensor],
    first: Tensor | None,
    cfg: float,
    block_step: object = dit.block_forward,
) -> Tensor:
    """The guided velocity at one time (0..1000) for latents [B, C, t, h, w]; text is of the
    prompts, followed by as many empty ones where cfg is not 1; first as in `generate`."""
    given = latents if first is None else torch.cat([first, latents[:, :, 1:]], 2)
    both = given if cfg == 1 else torch.cat([given, given])
    times = time.float().expand(len(both), 2).clone()
    if first is not None:
        times[:, 0] = 0
    found = dit.forward(parts.transformer, both, times, text, block_step)
    if cfg == 1:
        return found
    told, untold = found.chunk(2)
    return untold + cfg * (told - untold)


@torch.no_grad()
def generate(
    parts: Parts,
    prompts: list[str],
    noise: Tensor,
    first: Tensor | None = None,
    sampling: Sampling | None = None,
    block_step: object = dit.block_forward,
) -> Tensor:
    """noise [B, C, t, h, w]; first: latents [B, C, 1, h, w] of given first frames → latents.

    On a GPU the transformer and the text encoder multiply in bf16.
    """
    sampling = sampling or Sampling()
    scheduler = sampling.start(noise.device)
    told = prompts if sampling.cfg == 1 else prompts + [""] * len(prompts)
    ids = token_ids(parts.tokenizer, told).to(noise.device)
    # The scheduler stays outside, in float32.
    fast = torch.autocast(noise.device.type, torch.bfloat16, enabled=noise.is_cuda)
    with fast:
        text = dit.embed_text(parts.text_encoder, ids)
    latents = noise
    for t in scheduler.timesteps:
        with fast:
            found = velocity(parts, latents, t, text, first, sampling.cfg, block_step)
        latents = scheduler.step(found, t, latents, return_dict=False)[0]
    return latents if first is None else torch.cat([first, latents[:, :, 1:]], 2)
