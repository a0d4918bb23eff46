"""Train the demo model's autoencoder on freshly drawn clips, for a given number of seconds.

    python demo/train_vae.py --out build/vae --start src/sagewan/assets/demo/vae --seconds 160

Crops around an object first (they are cheap and rarely empty), whole clips after that.
Writes vae.safetensors (the averaged weights, float16), vae.json (the latents' mean and deviation,
the losses and the scores) and vae.png (held-out clips, each above its reconstruction).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import models
import torch
import whole_clip
import world
from diffusers import AutoencoderKLWan
from pace import Clock, LossLog
from replay import Replay
from safetensors.torch import load_file, save_file
from sheet import save_sheet
from torch import Tensor

from sagewan.evaluate import checker
from sagewan.evaluate.world import MOTIONS, SHAPES

log = logging.getLogger("train_vae")
CROP = 128
BLOCK = 48  # clips drawn at once
NIGHT = 0.15  # the share of clips in the style LoRA's look
AVERAGE_EVERY = 8


def gradients(video: Tensor) -> tuple[Tensor, Tensor]:
    return video[..., 1:, :] - video[..., :-1, :], video[..., 1:] - video[..., :-1]


def loss_of(video: Tensor, out: Tensor, rim: Tensor) -> Tensor:
    """Absolute error of pixels and of edges; objects and their rims count eight times as much."""
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


def crop_to_object(video: Tensor, rim: Tensor, centre: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """A random window of each clip around a point, centre [B, 2] in -1..1 on the CPU
    → [B, 3, T, side, side] and its rim."""
    full = video.shape[-1]
    middle = (centre + 1) * full / 2 + side * 0.7 * (torch.rand(len(video), 2) - 0.5)
    corner = (middle - side / 2).round().long().clamp(0, full - side) // 2 * 2
    windows = [
        (v[..., y : y + side, x : x + side], r[..., y : y + side, x : x + side])
        for v, r, (x, y) in zip(video, rim, corner.tolist(), strict=True)
    ]
    return torch.stack([w[0] for w in windows]), torch.stack([w[1] for w in windows])


def draw_scene(count: int, generator: torch.Generator, objects: int) -> world.Scene:
    """Training clips, about half of which hold what is hard to keep sharp: a ring's hole, or the
    fast motions."""
    scene = world.sample_scene(count + count // 2, generator, objects=objects)
    hard = scene.shape == SHAPES.index("ring")
    for name in ("orbit", "bounce"):
        hard |= scene.motion == MOTIONS.index(name)
    first = hard.any(1).int().argsort(descending=True, stable=True)
    return scene[first[:count]]


class Clips:
    """Endless random clips, rendered on the device in blocks: a third of them of two objects."""

    def __init__(self, seed: int, device: str, side: int, block: int = BLOCK) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.side, self.block = device, side, block
        self.video = self.rim = self.centre = torch.empty(0)

    @torch.no_grad()
    def _fill(self, count: int) -> None:
        video, rim, centre = [], [], []
        night = max(1, round(NIGHT * count))
        for objects, style, share in (
            (1, "plain", count - count // 3 - night),
            (2, "plain", count // 3),
            (1, "night", night),
        ):
            scene = draw_scene(share, self.generator, objects)
            path, _ = world.paths(scene, world.FRAMES)
            some = torch.randint(objects, (share,), generator=self.generator)
            when = torch.randint(world.FRAMES, (share,), generator=self.generator)
            centre.append(path[torch.arange(share), some, when])
            drawn = world.render(scene.to(self.device), world.FRAMES, self.side, style)
            video.append(drawn[0])
            rim.append(drawn[1])
        order = torch.randperm(count, generator=self.generator)
        self.video, self.rim = (torch.cat(p)[order.to(self.device)] for p in (video, rim))
        self.centre = torch.cat(centre)[order]

    @torch.no_grad()
    def next(self, count: int, crop: int | None) -> tuple[Tensor, Tensor]:
        """→ video [count, 3, T, side, side] in 0..1 and its rim, or windows near an object."""
        if len(self.video) < count:
            self._fill(max(self.block, count))
        video, rim, centre = self.video[:count], self.rim[:count], self.centre[:count]
        self.video, self.rim, self.centre = (
            self.video[count:],
            self.rim[count:],
            self.centre[count:],
        )
        return (video, rim) if crop is None else crop_to_object(video, rim, centre, crop)


class Trainer:
    """The autoencoder, its optimiser and its average; a step for each shape of batch."""

    def __init__(self, vae: AutoencoderKLWan, options: argparse.Namespace, device: str) -> None:
        self.vae, self.options = vae, options
        self.device = torch.device(device)
        self.gpu = device == "cuda"
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            vae.parameters(),
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            fused=self.gpu,
            capturable=self.gpu,
        )
        self.log = LossLog(self.device)
        self.average = {name: p.detach().clone() for name, p in vae.named_parameters()}

    def make_step(self, video: Tensor, rim: Tensor) -> Replay:
        """A step that reads its clips and rims from these two tensors."""

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                error, nats = step_loss(self.vae, video, rim, self.gpu)
            (error + 2e-5 * nats).backward()
            torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.log.add(error.detach())

        return Replay(step, self.device)

    def run(self, clips: Clips, clock: Clock, until: float, batch: int, crop: int | None) -> None:
        """Steps of one shape of batch, until the clock shows this much progress."""
        video, rim = (part.clone() for part in clips.next(batch, crop))
        step = self.make_step(video, rim)
        while clock.progress < until:
            for target, source in zip((video, rim), clips.next(batch, crop), strict=True):
                target.copy_(source)
            warm = min(1.0, (self.log.steps + 1) / 200)
            self.rate.fill_(self.options.lr * warm * clock.cosine())
            step()
            self.log.step()
            if self.log.steps % AVERAGE_EVERY == 0:
                self.update_average()

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(0.998, (self.log.steps + 1) / (self.log.steps + 20)) ** AVERAGE_EVERY
        torch._foreach_lerp_(list(self.average.values()), list(self.vae.parameters()), 1 - decay)


def save(average: dict[str, Tensor], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    halves = {n: p.to(torch.float16).contiguous() for n, p in average.items()}
    save_file(halves, out / "vae.safetensors")


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, count: int, device: str, side: int, out: Path) -> dict:
    """Scores on `count` held-out clips of one object and on as many of two; latents' statistics."""
    report: dict = {}
    moments, pairs = [], []
    for objects in (1, 2):
        generator = torch.Generator().manual_seed(10_001)
        scene = world.sample_scene(count, generator, unseen=True, objects=objects).to(device)
        errors, hits = [], []
        for begin in range(0, count, 8):
            part = scene[begin : begin + 8]
            video, _ = world.render(part, world.FRAMES, side)
            with torch.autocast(device, torch.bfloat16):
                mean, log_variance = whole_clip.encode(vae, video * 2 - 1)
                out_video = whole_clip.decode(vae, mean)
            seen = (out_video.float() / 2 + 0.5).clamp(0, 1)
            errors.append((seen - video).square().mean((1, 2, 3, 4)))
            hits.append(checker.look(seen).right(part.attributes()))
            moments.append((mean.float(), log_variance.float().exp()))
            if begin < 8:
                pairs += [clip for two in zip(video, seen, strict=True) for clip in two]
        scores = {k: torch.cat([h[k] for h in hits]).float().mean().item() for k in hits[0]}
        psnr = -10 * torch.log10(torch.cat(errors))
        scores |= {"psnr": psnr.mean().item(), "least_psnr": psnr.min().item()}
        report["one object" if objects == 1 else "two objects"] = scores
    save_sheet(pairs, out / "vae.png")
    mean = torch.cat([m for m, _ in moments]).transpose(0, 1).flatten(1)
    noise = torch.cat([v for _, v in moments]).transpose(0, 1).flatten(1).mean(1)
    return {
        "latents_mean": mean.mean(1).tolist(),
        "latents_std": (mean.var(1) + noise).sqrt().tolist(),
        "score": report,
    }


def load_start(path: Path) -> dict[str, Tensor]:
    """Weights of a diffusers folder, or of a file that this script wrote; float32."""
    file = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--start", type=Path, help="weights to go on from, file or folder")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--crop-share", type=float, default=0.5)
    parser.add_argument("--side", type=int, default=world.SIDE)
    parser.add_argument("--block", type=int, default=BLOCK, help="clips drawn at once")
    parser.add_argument("--scored", type=int, default=256, help="held-out clips to score")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    vae = models.build_vae().to(device)
    if options.start:
        vae.load_state_dict(load_start(options.start))
    clock = Clock(options.seconds)
    trainer = Trainer(vae, options, device)
    clips = Clips(options.seed, device, options.side, options.block)
    crop = min(CROP, options.side)
    trainer.run(clips, clock, options.crop_share, 4 * options.batch, crop)
    trainer.run(clips, clock, 1.0, options.batch, None)
    save(trainer.average, options.out)
    vae.load_state_dict(load_start(options.out / "vae.safetensors"))
    report = evaluate(vae, options.scored, device, options.side, options.out)
    report |= {"training": trainer.log.facts(options)}
    (options.out / "vae.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, scores in report["score"].items():
        log.info("%s: %s", name, {k: round(v, 3) for k, v in scores.items()})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
