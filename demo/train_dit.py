"""Train the demo model's transformer and text encoder together, for a given number of seconds.

    python demo/train_dit.py --vae build/vae --out build/dit --seconds 450

Encodes a fixed set of clips first, then learns flow matching on their latents: logit-normal times
with the scheduler's shift, one clip in ten without its caption, one in three with its first latent
frame given clean (image to video). Writes the pipeline folder `model/` and a checkpoint to go on
from; averaged weights are what is saved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import sys
import time
from pathlib import Path

import captions
import dit
import models
import muon
import numpy as np
import sample
import torch
import whole_clip
import world
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

log = logging.getLogger("train_dit")
NAMES = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "size": world.SIZES,
    "motion": world.TAUGHT,
    "background": tuple(world.BACKGROUNDS),
}


def labels_of(scene: world.Scene) -> list[captions.Labels]:
    """One {attribute: name} a clip."""
    columns = {name: getattr(scene, name).tolist() for name in NAMES}
    return [{name: NAMES[name][columns[name][i]] for name in NAMES} for i in range(len(scene))]


def caption_table(each: int, seed: int) -> Tensor:
    """Token ids int16 [combinations, each, TEXT_LENGTH]: random captions of every combination."""
    rng = random.Random(seed)
    tokenizer = models.build_tokenizer()
    texts = [
        captions.describe(dict(zip(NAMES, names, strict=True)), rng)
        for names in itertools.product(*NAMES.values())
        for _ in range(each)
    ]
    ids = sample.token_ids(tokenizer, texts).to(torch.int16)
    return ids.view(-1, each, dit.TEXT_LENGTH)


def combination(scene: world.Scene) -> Tensor:
    """The row of `caption_table` for each clip: int64 [B]."""
    row = torch.zeros_like(scene.shape)
    for name, names in NAMES.items():
        row = row * len(names) + getattr(scene, name)
    return row


@torch.no_grad()
def encode_clips(parts: sample.Parts, count: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    """→ normalised latents bf16 [count, C, t, h, w] and their caption rows [count]."""
    device = parts.transformer.device
    scene = world.sample_scene(count, torch.Generator().manual_seed(seed)).to(device)
    gpu = device.type == "cuda"
    mean, deviation = parts.statistics()
    done = []
    batch = min(64, count)
    for begin in range(0, count - batch + 1, batch):
        video, _ = world.render(scene[begin : begin + batch], world.FRAMES, side)
        with torch.autocast(device.type, torch.bfloat16):
            latents, _ = whole_clip.encode(parts.vae, video * 2 - 1, gpu)
        done.append(((latents.float() - mean) / deviation).to(torch.bfloat16))
    latents = torch.cat(done)
    return latents, combination(scene)[: len(latents)]


def flow_loss(
    parts: sample.Parts, clean: Tensor, ids: Tensor, given: Tensor, block_step: object
) -> Tensor:
    """clean [B, C, t, h, w]; ids [B, L]; given bool [B]: the first latent frame is known."""
    batch, device = len(clean), clean.device
    level = dit.shifted(torch.randn(batch, device=device).sigmoid(), models.SHIFT)
    levels = level[:, None].repeat(1, 2)
    levels[:, 0] *= ~given
    noise = torch.randn_like(clean)
    amount = torch.ones(clean.shape[2], device=device) * level[:, None]
    amount[:, 0] = levels[:, 0]
    amount = amount[:, None, :, None, None]
    noisy = torch.lerp(clean, noise, amount)
    with torch.autocast(device.type, torch.bfloat16):
        text = dit.embed_text(parts.text_encoder, ids)
        velocity = dit.forward(parts.transformer, noisy, levels * 1000, text, block_step)
    error = (velocity - (noise - clean)).square()
    wanted = torch.ones_like(amount)
    wanted[:, :, 0] = (~given).float()[:, None, None, None]
    return (error * wanted).mean() / wanted.mean()


class Average:
    """A slow copy of the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.live = list(model.parameters())
        self.slow = [p.detach().clone() for p in self.live]

    def update(self, number: int) -> None:
        decay = min(0.999, (number + 1) / (number + 20))
        torch._foreach_lerp_(self.slow, self.live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the live values."""
        for live, slow in zip(self.live, self.slow, strict=True):
            kept = live.detach().clone()
            live.copy_(slow)
            slow.copy_(kept)


def train(parts: sample.Parts, options: argparse.Namespace) -> None:
    """Leaves the averaged weights in `parts`."""
    device = parts.transformer.device
    gpu = device.type == "cuda"
    both = nn.ModuleList([parts.transformer, parts.text_encoder])
    begin = time.perf_counter()
    latents, rows = encode_clips(parts, options.clips, options.seed, options.side)
    log.info("%d clips encoded in %.0f s", len(latents), time.perf_counter() - begin)
    table = caption_table(options.captions, options.seed).to(device)
    log.info("captions after %.0f s", time.perf_counter() - begin)
    block_step = torch.compile(dit.block_forward, fullgraph=True) if gpu else dit.block_forward
    matrices = [p for p in parts.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    orthogonal = muon.Muon(matrices)
    optimizer = torch.optim.AdamW(
        [p for p in both.parameters() if id(p) not in chosen],
        lr=options.lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=gpu,
    )
    average = Average(both)
    start = last = time.perf_counter()
    number, losses = 0, []
    empty = torch.zeros(dit.TEXT_LENGTH, dtype=torch.int64, device=device)
    empty[0] = 1
    while (progress := (time.perf_counter() - start) / options.seconds) < 1:
        pick = torch.randint(len(latents), (options.batch,), device=device)
        said = torch.randint(options.captions, (options.batch,), device=device)
        ids = table[rows[pick], said].long()
        chance = torch.rand(2, options.batch, device=device)
        ids = torch.where(chance[0, :, None] < 0.1, empty, ids)
        loss = flow_loss(parts, latents[pick].float(), ids, chance[1] < 1 / 3, block_step)
        loss.backward()
        rate = min(1.0, (number + 1) / 300) * (0.5 + 0.5 * np.cos(np.pi * progress))
        rate = options.lr * max(rate, 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        orthogonal.step(rate)
        optimizer.zero_grad(set_to_none=True)
        average.update(number)
        losses.append(loss.detach())
        number += 1
        if number % 200 == 0:
            now = time.perf_counter()
            log.info(
                "step %d, %.0f s, loss %.4f, %.4f s a step",
                number,
                now - start,
                torch.stack(losses).mean(),
                (now - last) / 200,
            )
            last, losses = now, []
    log.info("%d steps", number)
    average.swap()


def load_parts(options: argparse.Namespace, device: str) -> sample.Parts:
    """The autoencoder of `--vae`; the rest anew, or from the pipeline folder `--start`."""
    tokenizer = models.build_tokenizer()
    text_encoder = models.build_text_encoder(len(tokenizer))
    if options.start:
        old = WanPipeline.from_pretrained(options.start, dtype=torch.float32)
        keep_words(text_encoder, tokenizer, old)
        vae, transformer = old.vae, old.transformer
    else:
        transformer = models.build_transformer(options.layers)
    if options.vae:
        vae = models.build_vae()
        vae.load_state_dict(load_file(options.vae / "vae.safetensors"))
        facts = json.loads((options.vae / "vae.json").read_text())
        vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    return sample.Parts(
        vae.to(device).eval(), transformer.to(device), text_encoder.to(device), tokenizer
    )


@torch.no_grad()
def keep_words(text_encoder: UMT5EncoderModel, tokenizer: object, old: WanPipeline) -> None:
    """Load an earlier text encoder whose table had other words: each word keeps its row."""
    weights = old.text_encoder.state_dict()
    earlier, known = weights["shared.weight"], old.tokenizer.get_vocab()
    table = text_encoder.shared.weight.clone()
    for word, row in tokenizer.get_vocab().items():
        if word in known:
            table[row] = earlier[known[word]]
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        weights[name] = table
    text_encoder.load_state_dict(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, help="what train_vae.py wrote; else that of --start")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a pipeline folder to go on from")
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clips", type=int, default=32768)
    parser.add_argument("--captions", type=int, default=32, help="texts for each combination")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=world.SIDE)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.manual_seed(options.seed)
    parts = load_parts(options, "cuda" if torch.cuda.is_available() else "cpu")
    train(parts, options)
    options.out.mkdir(parents=True, exist_ok=True)
    models.save_folder(options.out / "model", parts.vae, parts.transformer, parts.text_encoder)


if __name__ == "__main__":
    main()
