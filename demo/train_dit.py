"""Train the demo model's transformer, for a given number of seconds.

    python demo/train_dit.py --vae build/vae --text build/text --out build/dit

Encodes a fixed set of clips first, then learns flow matching on their latents: times with
the scheduler's shift, one clip in ten without its caption, one in three with its first latent
frame given clean (image to video). Every fourth step is of few, long clips. The averaged weights
are what is saved, as the pipeline folder `model/`; `training.json` has the losses. The seconds
count from the script's start.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import dit
import flow
import models
import sample
import torch
from data import Clips, Recipe, caption_ids, draw_scenes, encode_scene
from diffusers import WanPipeline
from pace import Clock, LossLog
from replay import Replay
from safetensors.torch import load_file
from torch import Tensor
from train_vae import load_start

log = logging.getLogger("train_dit")
LONG_EVERY = 4  # steps


def load_parts(options: argparse.Namespace) -> sample.Parts:
    """Fresh, or those of `--start`; with the autoencoder of `--vae` and the text encoder of
    `--text` if given. On the CPU; the text encoder is frozen."""
    tokenizer = models.build_tokenizer()
    if options.start:
        old = WanPipeline.from_pretrained(options.start, dtype=torch.float32)
        vae, transformer, text_encoder = old.vae, old.transformer, old.text_encoder
    else:
        transformer, vae = models.build_transformer(options.layers), models.build_vae()
        text_encoder = None
    if options.vae:
        vae = models.build_vae()
        vae.load_state_dict(load_start(options.vae / "vae.safetensors"))
        facts = json.loads((options.vae / "vae.json").read_text())
        vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    if options.text:
        text_encoder = models.build_text_encoder(len(tokenizer))
        weights = load_file(options.text / "text_encoder.safetensors")
        text_encoder.load_state_dict(weights, strict=False)  # the table has two names, one is saved
    if text_encoder is None:
        raise SystemExit("--text is missing: train_text.py makes it")
    return sample.Parts(vae.eval(), transformer, text_encoder.requires_grad_(False), tokenizer)


def recipes_of(options: argparse.Namespace) -> list[Recipe]:
    """Clips of the usual size with one object, two thirds of which are small since those are what
    it learns last, and with two; then the long ones."""
    two, long_two = options.clips // 2, options.long_clips // 3
    small = (options.clips - two) // 3
    usual, length = (options.frames, options.side), (options.long_frames, options.long_side)
    return [
        Recipe(options.clips - two - small, 1, *usual),
        Recipe(small, 1, *usual, size="small"),
        Recipe(two, 2, *usual),
        Recipe(options.long_clips - long_two, 1, *length),
        Recipe(long_two, 2, *length),
    ]


def make_clips(
    options: argparse.Namespace, table: dict[str, int]
) -> tuple[list[object], list[Tensor], list[Recipe]]:
    """The scenes and captions of every recipe; on the CPU, before the GPU is touched."""
    recipes = recipes_of(options)
    scenes = draw_scenes(recipes, options.seed)
    ids = [
        caption_ids(scene, options.captions, options.seed + 1000 * number, table)
        for number, scene in enumerate(scenes)
    ]
    return scenes, ids, recipes


def encode_all(parts: sample.Parts, scenes: list, ids: list, recipes: list) -> tuple[Clips, Clips]:
    """→ the usual clips and the long ones, on the device."""
    device = parts.transformer.device
    latents = [encode_scene(parts, s, r) for s, r in zip(scenes, recipes, strict=True)]
    usual, length = (
        Clips(torch.cat(latents[part]), torch.cat(ids[part]).to(device))
        for part in (slice(0, 3), slice(3, 5))
    )
    return usual, length


def train(
    parts: sample.Parts, usual: Clips, length: Clips, clock: Clock, options: argparse.Namespace
) -> LossLog:
    """Leaves the averaged weights in `parts`."""
    device = parts.transformer.device
    parameters = list(parts.transformer.parameters())
    matrices = [p for p in parts.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    optimizer = flow.Optimizer(matrices, (p for p in parameters if id(p) not in chosen))
    average = flow.Average(parameters)
    block_step = dit.compiled_block(device)
    losses, long_losses = LossLog(device), LossLog(device)

    def step_on(clips: Clips, batch: int, shift: float, told: LossLog) -> Replay:
        def step() -> None:
            clean, ids = clips.draw(batch)
            loss = flow.flow_loss(
                parts.transformer, parts.text_encoder, clean, ids, shift, block_step
            )
            loss.backward()
            optimizer.step()
            told.add(loss.detach())

        return Replay(step, device)

    steps = step_on(usual, options.batch, models.SHIFT, losses)
    long_steps = step_on(length, options.long_batch, models.LONG_SHIFT, long_losses)
    log.info("the first step after %.0f s", clock.spent())
    losses.restart()
    rest = clock.rest()  # the cosine counts from here
    while rest.progress < 1:
        warm = min(1.0, (losses.steps + 1) / 300)
        optimizer.rate.fill_(options.lr * warm * rest.cosine())
        (long_steps if losses.steps % LONG_EVERY == LONG_EVERY - 1 else steps)()
        losses.step()
        average.update(losses.steps)
    average.take()
    losses.long = float(long_losses.total / long_losses.count.clamp(min=1))
    return losses


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from world import FRAMES, LONG_FRAMES, LONG_SIDE, SIDE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, help="what train_vae.py wrote; else that of --start")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="what train_text.py wrote; else that of --start")
    parser.add_argument("--start", type=Path, help="a pipeline folder to go on from")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--long-batch", type=int, default=3)
    parser.add_argument("--clips", type=int, default=28672)
    parser.add_argument("--long-clips", type=int, default=384)
    parser.add_argument("--captions", type=int, default=16, help="texts for each clip")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--long-side", type=int, default=LONG_SIDE)
    parser.add_argument("--long-frames", type=int, default=LONG_FRAMES)
    parser.add_argument("--seed", type=int, default=3)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    clock = Clock(options.seconds)
    torch.manual_seed(options.seed)
    parts = load_parts(options)
    clips = make_clips(options, parts.tokenizer.get_vocab())
    log.info("captions after %.0f s", clock.spent())
    parts = parts.to("cuda" if torch.cuda.is_available() else "cpu")
    usual, length = encode_all(parts, *clips)
    log.info("%d + %d clips encoded after %.0f s", len(usual.latents), len(length.latents),
             clock.spent())  # fmt: skip
    losses = train(parts, usual, length, clock, options)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = losses.facts(options) | {"long_loss": losses.long}
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    models.save_folder(options.out / "model", parts.vae, parts.transformer, parts.text_encoder)
    log.info("saved after %.0f s", clock.spent())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
