"""Train the demo model's autoencoder on freshly drawn clips, for a given number of seconds.

    python demo/train_vae.py --out build/vae --seconds 420

Crops around the object first (they are cheap and rarely empty), whole clips after that.
Writes vae.safetensors (the averaged weights, float32), vae.json (the latents' mean and deviation
and the scores) and vae.png (held-out clips, each above its reconstruction).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path

import checker
import models
import torch
import whole_clip
import world
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from sheet import save_sheet
from torch import Tensor

log = logging.getLogger("train_vae")
CROP = 128


def gradients(video: Tensor) -> tuple[Tensor, Tensor]:
    return video[..., 1:, :] - video[..., :-1, :], video[..., 1:] - video[..., :-1]


def loss_of(video: Tensor, out: Tensor, rim: Tensor) -> Tensor:
    """Absolute error of pixels and of edges; the object and its rim count seven times more."""
    weight = 1 + 7 * rim
    error = ((out - video).abs() * weight).mean()
    edges = [
        ((ours - theirs).abs() * w).mean()
        for ours, theirs, w in zip(
            gradients(out), gradients(video), (weight[..., 1:, :], weight[..., 1:]), strict=True
        )
    ]
    return (error + 1.5 * (edges[0] + edges[1])) / weight.mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Nats per latent element from the standard normal."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def step_loss(
    vae: AutoencoderKLWan, video: Tensor, rim: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    """video in 0..1 → the two losses: reconstruction, divergence."""
    video = video * 2 - 1
    mean, log_variance = whole_clip.encode(vae, video, fused)
    mean, log_variance = mean.float(), log_variance.float()
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    out = whole_clip.decode(vae, latents, fused)
    return loss_of(video, out.float(), rim), divergence(mean, log_variance)


def crop_to_object(video: Tensor, rim: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """A random window of each clip near the object's mean place → [B, 3, T, side, side]."""
    weight = rim.sum((1, 2)) + 1e-6
    axis = torch.arange(video.shape[-1], device=video.device, dtype=torch.float32)
    total = weight.sum((1, 2))
    centre = torch.stack([(weight.sum(2) * axis).sum(1), (weight.sum(1) * axis).sum(1)], 1)
    centre = centre / total[:, None] + side * (torch.rand(len(video), 2, device=video.device) - 0.5)
    corner = (centre - side / 2).round().long().clamp(0, video.shape[-1] - side) // 2 * 2
    windows = [
        (v[..., y : y + side, x : x + side], r[..., y : y + side, x : x + side])
        for v, r, (y, x) in zip(video, rim, corner.tolist(), strict=True)
    ]
    return torch.stack([w[0] for w in windows]), torch.stack([w[1] for w in windows])


class Clips:
    """Endless random clips, rendered on the device in blocks."""

    def __init__(self, seed: int, device: str, side: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.side = device, side
        self.video = self.rim = torch.empty(0)

    @torch.no_grad()
    def next(self, count: int, crop: int | None) -> tuple[Tensor, Tensor]:
        """→ video [count, 3, T, side, side] in 0..1 and its rim, or windows near the object."""
        if len(self.video) < count:
            scene = world.sample_scene(3 * count, self.generator, every_motion=True).to(self.device)
            self.video, self.rim = world.render(scene, world.FRAMES, self.side)
        batch = self.video[:count], self.rim[:count]
        self.video, self.rim = self.video[count:], self.rim[count:]
        return batch if crop is None else crop_to_object(*batch, crop)


def backward(vae: AutoencoderKLWan, video: Tensor, rim: Tensor) -> Tensor:
    """One forward and backward; → reconstruction loss (detached)."""
    device = video.device.type
    with torch.autocast(device, torch.bfloat16):
        error, nats = step_loss(vae, video, rim, device == "cuda")
    (error + 2e-5 * nats).backward()
    return error.detach()


def train(vae: AutoencoderKLWan, options: argparse.Namespace, device: str) -> dict[str, Tensor]:
    """→ the averaged weights."""
    clips = Clips(options.seed, device, options.side)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    average = {name: p.detach().clone() for name, p in vae.named_parameters()}
    start = last = time.perf_counter()
    number = 0
    while (progress := (time.perf_counter() - start) / options.seconds) < 1:
        if progress < options.crop_share:  # a crop is a quarter of the pixels
            video, rim = clips.next(4 * options.batch, min(CROP, options.side))
        else:
            video, rim = clips.next(options.batch, None)
        rate = min(1.0, (number + 1) / 200) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = options.lr * rate
        error = backward(vae, video, rim)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (number + 1) / (number + 20))
        torch._foreach_lerp_(list(average.values()), list(vae.parameters()), 1 - decay)
        number += 1
        if number % 250 == 0:
            loss, now = float(error), time.perf_counter()
            each = (now - last) / 250
            log.info("step %d, %.0f s, loss %.4f, %.4f s a step", number, now - start, loss, each)
            last = now
    log.info("%d steps", number)
    return average


def save(average: dict[str, Tensor], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file({n: p.contiguous() for n, p in average.items()}, out / "vae.safetensors")


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, count: int, device: str, side: int, out: Path) -> dict:
    """Scores on `count` held-out clips; sets the latents' statistics in vae.config."""
    scene = world.sample_scene(count, torch.Generator().manual_seed(10_001), unseen=True)
    scene = scene.to(device)
    errors, hits, means, variances, pairs = [], [], [], [], []
    for begin in range(0, count, 8):
        part = scene[begin : begin + 8]
        video, _ = world.render(part, world.FRAMES, side)
        with torch.autocast(device, torch.bfloat16):
            mean, log_variance = whole_clip.encode(vae, video * 2 - 1)
            out_video = whole_clip.decode(vae, mean)
        seen = (out_video.float() / 2 + 0.5).clamp(0, 1)
        errors.append((seen - video).square().mean((1, 2, 3, 4)))
        hits.append(checker.look(seen).right(part))
        means.append(mean.float())
        variances.append(log_variance.float().exp())
        if begin < 16:
            pairs += [clip for two in zip(video, seen, strict=True) for clip in two]
    save_sheet(pairs[:24], out / "vae.png")
    scores = {k: torch.cat([h[k] for h in hits]).float().mean().item() for k in hits[0]}
    scores["psnr"] = (-10 * torch.log10(torch.cat(errors))).mean().item()
    mean = torch.cat(means).transpose(0, 1).flatten(1)
    spread = (mean.var(1) + torch.cat(variances).transpose(0, 1).flatten(1).mean(1)).sqrt()
    log.info("deviation of means %s", mean.std(1).cpu().numpy().round(2).tolist())
    return {"latents_mean": mean.mean(1).tolist(), "latents_std": spread.tolist(), "score": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--crop-share", type=float, default=0.45)
    parser.add_argument("--side", type=int, default=world.SIDE)
    parser.add_argument("--scored", type=int, default=256, help="held-out clips to score")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    vae = models.build_vae().to(device)
    if options.start:
        vae.load_state_dict(load_file(options.start))
    average = train(vae, options, device)
    vae.load_state_dict(average)
    save(average, options.out)
    report = evaluate(vae, options.scored, device, options.side, options.out)
    (options.out / "vae.json").write_text(json.dumps(report, indent=1) + "\n")
    log.info("%s", report["score"])


if __name__ == "__main__":
    main()
