"""A style LoRA for the demo model: the same clips at night, every object a lamp.

    python demo/train_style.py --model build/dit/model --out build/night.safetensors

Flow matching as in train_dit.py, on clips drawn in that look, with the captions as they are: the
style is in the weights. The seconds count from the script's start.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import dit
import flow
import low_rank
import models
import sample
import torch
from data import Clips, Recipe, caption_ids, draw_scenes, encode_scene
from pace import Clock, LossLog
from replay import Replay

log = logging.getLogger("train_style")


def train(parts: sample.Parts, clips: Clips, clock: Clock, options: argparse.Namespace) -> LossLog:
    """Leaves the averaged LoRA in the transformer."""
    device = parts.transformer.device
    trained = low_rank.add(parts.transformer, options.rank)
    parts.text_encoder.requires_grad_(False)
    optimizer = flow.Optimizer([], trained)
    average = flow.Average(trained)
    block_step = dit.compiled_block(device)
    losses = LossLog(device)

    def step() -> None:
        clean, ids = clips.draw(options.batch)
        loss = flow.flow_loss(
            parts.transformer, parts.text_encoder, clean, ids, models.SHIFT, block_step
        )
        loss.backward()
        optimizer.step()
        losses.add(loss.detach())

    replayed = Replay(step, device)
    log.info("the first step after %.0f s", clock.spent())
    losses.restart()
    rest = clock.rest()
    while rest.progress < 1:
        optimizer.rate.fill_(options.lr * min(1.0, (losses.steps + 1) / 100) * rest.cosine())
        replayed()
        losses.step()
        average.update(losses.steps)
    average.take()
    return losses


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from world import FRAMES, SIDE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="the LoRA's file")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clips", type=int, default=3072)
    parser.add_argument("--captions", type=int, default=8, help="texts for each clip")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--seed", type=int, default=5)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    clock = Clock(options.seconds)
    torch.manual_seed(options.seed)
    parts = sample.load(options.model, "cpu", torch.float32)
    recipes = [
        Recipe(options.clips - options.clips // 3, 1, options.frames, options.side, "night"),
        Recipe(options.clips // 3, 2, options.frames, options.side, "night"),
    ]
    table = parts.tokenizer.get_vocab()
    scenes = draw_scenes(recipes, options.seed)
    ids = [
        caption_ids(s, options.captions, options.seed + 100 * n, table)
        for n, s in enumerate(scenes)
    ]
    parts = parts.to("cuda" if torch.cuda.is_available() else "cpu")
    device = parts.transformer.device
    latents = [encode_scene(parts, s, r) for s, r in zip(scenes, recipes, strict=True)]
    clips = Clips(torch.cat(latents), torch.cat(ids).to(device))
    log.info("%d clips after %.0f s", len(clips.latents), clock.spent())
    losses = train(parts, clips, clock, options)
    low_rank.save(parts.transformer, options.out)
    facts = json.dumps(losses.facts(options), indent=1) + "\n"
    options.out.with_suffix(".json").write_text(facts)
    log.info("saved after %.0f s", clock.spent())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
