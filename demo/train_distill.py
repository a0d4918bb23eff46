"""Distil sixteen guided steps of the demo model into four unguided ones: a LoRA.

    python demo/train_distill.py --model build/dit/model --out build/four-steps.safetensors

The teacher, sampled as users sample it, leaves its trail at the student's four noise levels. Each
student step learns the straight way from where it stands to the next point of the same trail: at
first from the teacher's own points, then mostly from where the student itself has come to, so that
it learns to correct what its earlier steps got wrong. The seconds count from the script's start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import dit
import flow
import low_rank
import models
import sample
import torch
from data import Recipe, caption_ids, draw_scenes, encode_scene
from pace import Clock, LossLog
from replay import Replay
from torch import Tensor, nn

log = logging.getLogger("train_distill")
STUDENT = sample.Sampling(steps=4, cfg=1.0, shift=models.SHIFT, scheduler="euler")
BETWEEN = 4  # teacher steps to one of the student's


@dataclass(frozen=True)
class Trails:
    """points bf16 [5, N, C, t, h, w]: the teacher's latents at the student's noise levels, from
    noise to clean; ids int64 [N, L]; known bool [N]: the first latent frame was given; levels
    float32 [5]."""

    points: Tensor
    ids: Tensor
    known: Tensor
    levels: Tensor


def student_levels(device: torch.device) -> Tensor:
    """float32 [5]: noise levels from 1 to 0."""
    return STUDENT.start(device).sigmas.to(device=device, dtype=torch.float32)


def _with_first(latents: Tensor, clean: Tensor, known: Tensor) -> Tensor:
    """Latents whose first frame is the clean one where that is known."""
    first = torch.where(known[:, None, None, None, None], clean[:, :, :1], latents[:, :, :1])
    return torch.cat([first, latents[:, :, 1:]], 2)


def _velocity(
    parts: sample.Parts,
    latents: Tensor,
    level: Tensor,
    known: Tensor,
    text: tuple[Tensor, Tensor],
    block_step: object,
) -> Tensor:
    """level [B] or scalar in 0..1; where `known`, the first latent frame has time 0."""
    level = level.expand(len(latents))
    times = torch.stack([level * ~known, level], 1) * 1000
    return dit.forward(parts.transformer, latents, times, text, block_step)


@torch.no_grad()
def teach(
    parts: sample.Parts, clean: Tensor, ids: Tensor, cfg: float, block_step: object
) -> Trails:
    """The teacher's trails for these prompts; for the first third of them the clips' first latent
    frames are given. Heun's rule on a grid four times as fine as the student's."""
    device = clean.device
    levels = student_levels(device)
    known = torch.arange(len(clean), device=device) < len(clean) / 3
    text = dit.embed_text(parts.text_encoder, torch.cat([ids, _empty(ids)]))
    twice = torch.cat([known, known])

    def guided(latents: Tensor, level: Tensor) -> Tensor:
        given = _with_first(latents, clean, known)
        both = torch.cat([given, given])
        told, untold = _velocity(parts, both, level, twice, text, block_step).chunk(2)
        return untold + cfg * (told - untold)

    latents = torch.randn_like(clean)
    points = [latents]
    for start, end in itertools.pairwise(levels):
        grid = torch.linspace(0, 1, BETWEEN + 1, device=device)
        grid = start + (end - start) * grid
        for here, there in itertools.pairwise(grid):
            slope = guided(latents, here)
            ahead = latents + (there - here) * slope
            latents = latents + (there - here) * (slope + guided(ahead, there)) / 2
        points.append(latents)
    points = [_with_first(p, clean, known) for p in points]
    return Trails(torch.stack(points).to(torch.bfloat16), ids, known, levels)


def _empty(ids: Tensor) -> Tensor:
    empty = torch.zeros_like(ids)
    empty[:, 0] = 1
    return empty


def make_trails(
    parts: sample.Parts, options: argparse.Namespace, ids: Tensor, scene: object, recipe: Recipe
) -> Trails:
    device = parts.transformer.device
    block_step = dit.compiled_block(device)
    clean = encode_scene(parts, scene, recipe)
    found = []
    batch = options.batch // 2  # with and without its prompt, as large as the student's
    with torch.autocast(device.type, torch.bfloat16):
        for begin in range(0, len(clean) - batch + 1, batch):
            part = slice(begin, begin + batch)
            told = ids[part, 0].long().to(device)
            found.append(teach(parts, clean[part].float(), told, options.cfg, block_step))
    return Trails(
        torch.cat([f.points for f in found], 1),
        torch.cat([f.ids for f in found]),
        torch.cat([f.known for f in found]),
        found[0].levels,
    )


def make_steps(
    parts: sample.Parts, trails: Trails, optimizer: flow.Optimizer, losses: LossLog, batch: int
) -> list[tuple[Replay, Replay]]:
    """For each of the four student steps: the training step from the teacher's point, and the one
    from where the student itself gets to."""
    device = parts.transformer.device
    block_step = dit.compiled_block(device)
    levels = trails.levels

    def step_of(number: int, own: bool) -> Replay:
        def step() -> None:
            pick = torch.randint(len(trails.ids), (batch,), device=device)
            points, known = trails.points[:, pick].float(), trails.known[pick]
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                with torch.no_grad():
                    text = dit.embed_text(parts.text_encoder, trails.ids[pick])
                    here = points[0] if own else points[number]
                    for before in range(number if own else 0):
                        found = _velocity(parts, here, levels[before], known, text, block_step)
                        here = here + (levels[before + 1] - levels[before]) * found
                        here = _with_first(here, points[4], known)
                found = _velocity(parts, here, levels[number], known, text, block_step)
            target = (points[number + 1] - here) / (levels[number + 1] - levels[number])
            wanted = torch.ones_like(target[:, :1, :, :1, :1])
            wanted[:, :, 0] = (~known).float()[:, None, None, None]
            loss = ((found - target).square() * wanted).mean() / wanted.mean()
            loss.backward()
            optimizer.step()
            losses.add(loss.detach())

        return Replay(step, device)

    return [(step_of(n, False), step_of(n, n > 0)) for n in range(STUDENT.steps)]


def train(
    parts: sample.Parts,
    trained: list[nn.Parameter],
    trails: Trails,
    clock: Clock,
    options: argparse.Namespace,
) -> LossLog:
    """Leaves the averaged LoRA in the transformer."""
    device = parts.transformer.device
    parts.text_encoder.requires_grad_(False)
    optimizer = flow.Optimizer([], trained)
    average = flow.Average(trained)
    losses = LossLog(device)
    steps = make_steps(parts, trails, optimizer, losses, options.batch)
    log.info("the first step after %.0f s", clock.spent())
    losses.restart()
    rest = clock.rest()
    while rest.progress < 1:
        optimizer.rate.fill_(options.lr * min(1.0, (losses.steps + 1) / 100) * rest.cosine())
        own = rest.progress > 0.3 and losses.steps % 8 >= 2  # then three quarters are its own
        steps[losses.steps % STUDENT.steps][own]()
        losses.step()
        average.update(losses.steps)
    average.take()
    return losses


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from world import FRAMES, SIDE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the teacher's pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="the LoRA's file")
    parser.add_argument("--seconds", type=float, default=95)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--cfg", type=float, help="the teacher's guidance; else its default")
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--trails", type=int, default=5120)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--seed", type=int, default=4)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    clock = Clock(options.seconds)
    torch.manual_seed(options.seed)
    if options.cfg is None:
        options.cfg = sample.default_sampling(options.model).cfg
    parts = sample.load(options.model, "cpu", torch.float32)
    two = options.trails // 3
    recipes = [
        Recipe(options.trails - two, 1, options.frames, options.side),
        Recipe(two, 2, options.frames, options.side),
    ]
    table = parts.tokenizer.get_vocab()
    scenes = draw_scenes(recipes, options.seed)
    ids = [caption_ids(s, 1, options.seed + n, table) for n, s in enumerate(scenes)]
    parts = parts.to("cuda" if torch.cuda.is_available() else "cpu")
    # It changes nothing yet, and the teacher's blocks are compiled as the student's are.
    trained = low_rank.add(parts.transformer, options.rank)
    made = [
        make_trails(parts, options, i, s, r) for i, s, r in zip(ids, scenes, recipes, strict=True)
    ]
    trails = Trails(
        torch.cat([m.points for m in made], 1),
        torch.cat([m.ids for m in made]),
        torch.cat([m.known for m in made]),
        made[0].levels,
    )
    log.info("%d trails after %.0f s", len(trails.ids), clock.spent())
    losses = train(parts, trained, trails, clock, options)
    taught = {"steps": STUDENT.steps, "cfg": STUDENT.cfg, "shift": STUDENT.shift,
              "scheduler": STUDENT.scheduler}  # fmt: skip
    low_rank.save(parts.transformer, options.out, taught)
    facts = json.dumps(losses.facts(options), indent=1) + "\n"
    options.out.with_suffix(".json").write_text(facts)
    log.info("saved after %.0f s", clock.spent())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
