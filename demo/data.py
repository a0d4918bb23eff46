"""What the transformer learns from: the latents of clips, and several captions of each."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import captions
import dit
import numpy as np
import sample
import torch
import whole_clip
import world
from torch import Tensor

from sagewan.evaluate.prompts import Labels
from sagewan.evaluate.world import NAMES, OF_OBJECT


@dataclass(frozen=True)
class Recipe:
    """Which clips to draw. `style` is one of world.STYLES; `size` is that of every object, any
    if it is left out."""

    count: int
    objects: int
    frames: int
    side: int
    style: str = "plain"
    size: str | None = None


@dataclass(frozen=True)
class Clips:
    """Normalised latents bf16 [N, C, t, h, w], and token ids int16 [N, each, TEXT_LENGTH]."""

    latents: Tensor
    ids: Tensor

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random clips with one caption each: latents float32 [B, …], ids int64 [B, TEXT_LENGTH].

        Made of operations on the device alone, so that a CUDA graph can hold them.
        """
        device = self.latents.device
        pick = torch.randint(len(self.latents), (batch,), device=device)
        said = torch.randint(self.ids.shape[1], (batch,), device=device)
        return self.latents[pick].float(), self.ids[pick, said].long()


def labels_of(scene: world.Scene) -> list[tuple[list[Labels], str]]:
    """For each clip {attribute: name} of its objects from left to right, and its background."""
    index = {name: getattr(scene, name).tolist() for name in NAMES}
    return [
        (
            [
                {name: NAMES[name][index[name][clip][number]] for name in OF_OBJECT}
                for number in range(scene.objects)
            ],
            NAMES["background"][index["background"][clip]],
        )
        for clip in range(len(scene))
    ]


def token_ids(texts: Sequence[str], table: dict[str, int]) -> np.ndarray:
    """int16 [B, TEXT_LENGTH], as the tokenizer gives them, without its cost."""
    ids = np.zeros((len(texts), dit.TEXT_LENGTH), dtype=np.int16)
    for row, text in zip(ids, texts, strict=True):
        found = [table[word] for word in captions.words(text)] + [table["</s>"]]
        row[: len(found)] = found
    return ids


def _captions(arguments: tuple[list, int, int, dict[str, int]]) -> np.ndarray:
    # No torch in here: its threads do not survive the fork.
    labels, each, seed, table = arguments
    rng = random.Random(seed)
    texts = [captions.describe(*clip, rng) for clip in labels for _ in range(each)]
    return token_ids(texts, table).reshape(-1, each, dit.TEXT_LENGTH)


def by_all_cores(
    write: Callable[[tuple[list, int, int, dict[str, int]]], np.ndarray],
    labels: list,
    each: int,
    seed: int,
    table: dict[str, int],
) -> Tensor:
    """`write((labels, each, seed, table))` for parts of the labels, one after the other in one
    tensor. Call it before anything touches the GPU: the processes are forked.
    """
    workers = min(16, os.cpu_count() or 1, -(-len(labels) // 256))
    size = -(-len(labels) // workers)
    parts = [labels[begin : begin + size] for begin in range(0, len(labels), size)]
    arguments = [(part, each, seed + number, table) for number, part in enumerate(parts)]
    if workers == 1:
        return torch.from_numpy(write(arguments[0]))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(write, arguments))))


def caption_ids(scene: world.Scene, each: int, seed: int, table: dict[str, int]) -> Tensor:
    """`each` random captions of every clip: int16 [B, each, TEXT_LENGTH]."""
    return by_all_cores(_captions, labels_of(scene), each, seed, table)


@torch.no_grad()
def encode_scene(parts: sample.Parts, scene: world.Scene, recipe: Recipe) -> Tensor:
    """Normalised latents bf16 [N, C, t, h, w] of a scene's clips."""
    device = parts.transformer.device
    scene = scene.to(device)
    mean, deviation = parts.statistics()
    # About as many pixels at once as 64 clips of 17 frames of 256 x 256.
    batch = max(1, int(64 * 17 * 256**2 / (recipe.frames * recipe.side**2)))
    done = []
    for begin in range(0, len(scene), batch):
        part = scene[begin : begin + batch]
        video, _ = world.render(part, recipe.frames, recipe.side, recipe.style)
        with torch.autocast(device.type, torch.bfloat16):
            latents, _ = whole_clip.encode(parts.vae, video * 2 - 1, device.type == "cuda")
        done.append(((latents.float() - mean) / deviation).to(torch.bfloat16))
    return torch.cat(done)


def draw_scenes(recipes: Sequence[Recipe], seed: int) -> list[world.Scene]:
    """The training clips of each recipe: never a held-out combination."""
    generator = torch.Generator().manual_seed(seed)
    return [world.sample_scene(r.count, generator, objects=r.objects, size=r.size) for r in recipes]
