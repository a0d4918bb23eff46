"""Score the demo model on held-out prompts: does each clip show what its prompt says?

    python demo/score.py --model src/sagewan/assets/demo --count 432 --out build/score

Prints a table (English, Chinese, image to video) and saves scores.json and sheet.png with the
first 24 clips, not chosen. `--bf16` runs the transformer and text encoder in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import captions
import checker
import dit
import models
import sample
import torch
import world
from diffusers import WanPipeline
from sheet import save_sheet
from torch import Tensor
from train_dit import labels_of

log = logging.getLogger("score")
KINDS = ("english", "chinese", "image")


def load(folder: Path, device: str, dtype: torch.dtype) -> sample.Parts:
    pipe = WanPipeline.from_pretrained(folder, dtype=dtype)
    pipe.vae.to(torch.float32)
    pipe.to(device)
    return sample.Parts(pipe.vae, pipe.transformer, pipe.text_encoder, pipe.tokenizer)


def noise_for(count: int, side: int, seed: int, device: str) -> Tensor:
    shape = (count, models.LATENT_CHANNELS, 1 + (world.FRAMES - 1) // 4, side // 16, side // 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def score_batch(
    parts: sample.Parts, kind: str, scene: world.Scene, seed: int, side: int, step: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """→ clips [B, 3, T, H, W] and what is right of each; `image` gives the true first frame."""
    device = str(parts.transformer.device)
    half = len(scene) // 2  # half the prompts name size and background, half leave them out
    prompts = [
        captions.canonical(
            labels if i < half else {n: labels[n] for n in ("shape", "colour", "motion")},
            "zh" if kind == "chinese" else "en",
        )
        for i, labels in enumerate(labels_of(scene))
    ]
    noise = noise_for(len(scene), side, seed, device)
    scene = scene.to(device)
    first = real = None
    if kind == "image":
        real = world.render(scene, world.FRAMES, side)[0][:, :, :1]
        first = sample.encode(parts, real)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
        latents = sample.generate(parts, prompts, noise, first, block_step=step)
    video = torch.cat([sample.decode(parts, part) for part in latents.float().split(16)])
    hits = {k: v.float() for k, v in checker.look(video).right(scene).items()}
    if kind != "image":
        for name in ("size", "background"):
            hits[name][half:] = float("nan")
    else:
        error = (video[:, :, :1] - real).square().mean((1, 2, 3, 4))
        hits["first_frame_psnr"] = -10 * error.log10()
    return video, hits


def score(parts: sample.Parts, options: argparse.Namespace, step: object) -> dict:
    """The mean of every hit for every kind of prompt, on the same held-out scenes."""
    table, shown = {}, []
    for kind in options.kinds:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(options.seed)
        collected: dict[str, list[Tensor]] = {}
        for begin in range(0, options.count, options.batch):
            scene = world.sample_scene(options.batch, generator, unseen=not options.seen)
            video, hits = score_batch(parts, kind, scene, options.seed + begin, options.side, step)
            for name, values in hits.items():
                collected.setdefault(name, []).append(values.cpu())
            if begin == 0:
                shown += list(video[: {"english": 12, "chinese": 6, "image": 6}[kind]].cpu())
        flat = {name: torch.cat(values) for name, values in collected.items()}
        table[kind] = {name: round(v.nanmean().item(), 4) for name, v in flat.items()}
        motions = labels_misses(flat, options)
        log.info("%-8s %s (%.0f s)", kind, table[kind], time.perf_counter() - start)
        log.info("         right by motion %s; by shape %s", *motions)
    save_sheet(shown, options.out / "sheet.png")
    return table


def labels_misses(flat: dict[str, Tensor], options: argparse.Namespace) -> tuple[dict, dict]:
    """Share of clips with everything right, by motion and by shape."""
    generator = torch.Generator().manual_seed(options.seed)
    scenes = [
        world.sample_scene(options.batch, generator, unseen=not options.seen)
        for _ in range(0, options.count, options.batch)
    ]
    out = []
    for name, names in (("motion", world.TAUGHT), ("shape", world.SHAPES)):
        index = torch.cat([getattr(s, name) for s in scenes])
        out.append(
            {n: round(flat["all"][index == i].mean().item(), 2) for i, n in enumerate(names)}
        )
    return out[0], out[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seen", action="store_true", help="combinations of training instead")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--side", type=int, default=world.SIDE)
    parser.add_argument("--seed", type=int, default=10_002)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = load(options.model, device, torch.bfloat16 if options.bf16 else torch.float32)
    table = score(parts, options, dit.block_forward)
    (options.out / "scores.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
