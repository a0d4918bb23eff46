"""Train the demo model's text encoder to tell which word belongs to which object.

    python demo/train_text.py --out build/text

A transformer that learns from pictures alone takes long to notice that "red" in "a red ball and a
blue star" is the ball's: for a long time either colour on either side explains the pictures
equally well. So the encoder learns it first, from captions and what they mean. A `Reader` looks at
the encoded words as the transformer will, by cross-attention, once for the left object, once for
the right one and once for the background, and must name every attribute, or say that the caption
does not. The encoder is then frozen: `train_dit.py --text build/text`.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import captions
import dit
import models
import numpy as np
import torch
import world
from data import by_all_cores, labels_of, token_ids
from pace import Clock, LossLog
from replay import Replay
from safetensors.torch import save_file
from tokenizer import build_tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from sagewan.evaluate.prompts import Labels
from sagewan.evaluate.world import NAMES, OF_OBJECT

log = logging.getLogger("train_text")
PLACES = 3  # the left object, the right one, the background


@dataclass(frozen=True)
class Meanings:
    """Token ids int64 [N, TEXT_LENGTH], and what each caption says: int64 [N, 9], the attributes
    of the left object, of the right one, the background; 0 where nothing is said, else index + 1.
    """

    ids: Tensor
    said: Tensor

    def to(self, device: torch.device) -> Meanings:
        return Meanings(self.ids.to(device), self.said.to(device))


def _meaning(said: list[Labels], background: str | None) -> list[int]:
    numbers = []
    for place in range(2):
        labels = said[place] if place < len(said) else {}
        numbers += [NAMES[n].index(labels[n]) + 1 if n in labels else 0 for n in OF_OBJECT]
    return [*numbers, NAMES["background"].index(background) + 1 if background else 0]


def _write(arguments: tuple[list, int, int, dict[str, int]]) -> np.ndarray:
    # No torch in here: its threads do not survive the fork.
    labels, each, seed, table = arguments
    rng = random.Random(seed)
    chosen = [captions.choose(*clip, rng) for clip in labels for _ in range(each)]
    ids = token_ids([captions.speak(*clip, rng) for clip in chosen], table)
    said = np.array([_meaning(*clip) for clip in chosen], dtype=np.int16)
    return np.concatenate([ids, said], 1).reshape(len(labels), each, -1)


def draw_meanings(count: int, seed: int, table: dict[str, int], *, unseen: bool) -> Meanings:
    """Random captions, half of them of two objects; `unseen` of held-out combinations only."""
    generator = torch.Generator().manual_seed(seed)
    labels = [
        clip
        for objects in (1, 2)
        for clip in labels_of(
            world.sample_scene(count // 2, generator, unseen=unseen, objects=objects)
        )
    ]
    found = by_all_cores(_write, labels, 1, seed, table)[:, 0].long()
    return Meanings(*found.split([dit.TEXT_LENGTH, 2 * len(OF_OBJECT) + 1], 1))


class Reader(nn.Module):
    """Cross-attention from PLACES learnt queries to the encoded words, then one linear layer for
    each attribute; thrown away after training."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, PLACES, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.of_object = nn.ModuleList(nn.Linear(width, len(NAMES[n]) + 1) for n in OF_OBJECT)
        self.of_background = nn.Linear(width, len(NAMES["background"]) + 1)

    def forward(self, words: Tensor, real: Tensor) -> list[Tensor]:
        """words [B, L, D], real bool [B, L] → logits of the nine columns of `Meanings.said`."""
        query = self.query.expand(len(words), -1, -1)
        seen, _ = self.attention(query, words, words, key_padding_mask=~real, need_weights=False)
        objects = [layer(seen[:, place]) for place in range(2) for layer in self.of_object]
        return [*objects, self.of_background(seen[:, 2])]


def read(encoder: UMT5EncoderModel, reader: Reader, ids: Tensor) -> list[Tensor]:
    words, _ = dit.embed_text(encoder, ids)
    return reader(words, ids != 0)


@torch.no_grad()
def all_right(encoder: UMT5EncoderModel, reader: Reader, meanings: Meanings) -> float:
    """The share of captions of which everything is understood."""
    hits = []
    for ids, said in zip(meanings.ids.split(1024), meanings.said.split(1024), strict=True):
        guessed = torch.stack([logits.argmax(1) for logits in read(encoder, reader, ids)], 1)
        hits.append((guessed == said).all(1))
    return torch.cat(hits).float().mean().item()


def train(
    encoder: UMT5EncoderModel, reader: Reader, meanings: Meanings, options: argparse.Namespace
) -> LossLog:
    device = meanings.ids.device
    gpu = device.type == "cuda"
    rate = torch.zeros((), device=device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=gpu, capturable=gpu
    )
    losses = LossLog(device)

    def step() -> None:
        pick = torch.randint(len(meanings.ids), (options.batch,), device=device)
        found = read(encoder, reader, meanings.ids[pick])
        said = meanings.said[pick]
        loss = sum(
            nn.functional.cross_entropy(logits, said[:, column])
            for column, logits in enumerate(found)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        losses.add(loss.detach())

    replay = Replay(step, device)
    clock = Clock(options.seconds)
    losses.restart()
    while clock.progress < 1:
        rate.fill_(options.lr * min(1.0, (losses.steps + 1) / 200) * clock.cosine())
        replay()
        losses.step()
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--scored", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    table = build_tokenizer().get_vocab()
    known = draw_meanings(options.captions, options.seed, table, unseen=False)
    unseen = draw_meanings(options.scored, options.seed + 1, table, unseen=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = models.build_text_encoder(len(table)).to(device)
    reader = Reader(encoder.config.d_model).to(device)
    losses = train(encoder, reader, known.to(device), options)
    right = all_right(encoder, reader, unseen.to(device))
    log.info("%.4f of %d held-out captions understood", right, options.scored)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in encoder.named_parameters()}
    save_file(weights, options.out / "text_encoder.safetensors")
    facts = losses.facts(options) | {"held-out captions understood": round(right, 4)}
    (options.out / "text.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
