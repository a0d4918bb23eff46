"""Prompts of the demo model's world that its training never showed, and whether clips keep them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sagewan.checkpoint.files import read_json
from sagewan.errors import CheckpointError
from sagewan.evaluate import checker, world
from sagewan.evaluate.prompts import LANGUAGES, Labels, plain
from sagewan.plan.models import Model
from sagewan.plan.words import check_words

# Every fourth prompt names two objects, where the model knows two; every second one also the size
# (of one object) and the background.
_PAIRS, _FULL = 4, 2
# The checker holds a float32 copy of what it looks at, and some masks.
_LOOKED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Taught:
    """How much of the world a model was taught: the most objects in a clip, and the motions."""

    objects: int = 2
    motions: tuple[str, ...] = world.MOTIONS

    @classmethod
    def of(cls, model: Model) -> "Taught":
        """As ``taught`` in the model's ``sagewan.json`` says; all, where it says nothing. Raises
        CheckpointError for what is no part of the world."""
        path = (model.location or Path()) / "sagewan.json"
        said = read_json(path).get("taught", {}) if path.is_file() else {}
        objects, motions = said.get("objects", 2), said.get("motions", world.MOTIONS)
        if objects not in (1, 2) or not motions or not set(motions) <= set(world.MOTIONS):
            raise CheckpointError(
                f"{path}: taught must hold objects, 1 or 2, and motions of "
                f"{', '.join(world.MOTIONS)}"
            )
        return cls(objects=objects, motions=tuple(motions))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt and, where it is one of these, what it promises: the objects from left to right and
    the background, each with only what the prompt names."""

    prompt: str
    language: str | None = None
    objects: tuple[Labels, ...] = ()
    background: str | None = None

    def promised(self) -> dict[str, Tensor]:
        """As :meth:`checker.Seen.right` wants it, for one clip."""
        names = [name for name in world.OF_OBJECT if all(name in o for o in self.objects)]
        found = {
            name: torch.tensor([[world.NAMES[name].index(o[name]) for o in self.objects]])
            for name in names
        }
        if self.background:
            grounds = world.NAMES["background"]
            found["background"] = torch.tensor([grounds.index(self.background)])
        return found


def held_out_prompts(count: int, seed: int, model: Model) -> list[Asked]:
    """The first ``count`` of a seed's sequence, English and Chinese in turn, of what the model was
    taught. Raises CheckpointError, and RequestError where its vocabulary lacks a word of them."""
    rng = random.Random(seed)  # noqa: S311 no secret
    taught = Taught.of(model)
    combinations = [c for c in _combinations() if world.MOTIONS[c[2]] in taught.motions]
    asked = [_draw(rng, number, combinations, taught) for number in range(count)]
    for one in asked:
        check_words("prompt", one.prompt, model)
    return asked


def _combinations() -> list[tuple[int, int, int]]:
    """Every held-out shape, colour and motion, by their places in the world."""
    sizes = (len(world.SHAPES), len(world.COLOURS), len(world.MOTIONS))
    indices = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    kept = indices[world.held_out(*indices.unbind(-1))]
    return [(int(shape), int(colour), int(motion)) for shape, colour, motion in kept]


def _draw(
    rng: random.Random,
    number: int,
    combinations: Sequence[tuple[int, int, int]],
    taught: Taught,
) -> Asked:
    language = LANGUAGES[number % len(LANGUAGES)]
    pair = taught.objects > 1 and number // len(LANGUAGES) % _PAIRS == _PAIRS - 1
    full = number // len(LANGUAGES) // _PAIRS % _FULL == 0
    chosen = [rng.choice(combinations)]
    while pair and len(chosen) < 2:
        other = rng.choice(combinations)
        # As in training, two objects have different colours and motions.
        if other[1] != chosen[0][1] and other[2] != chosen[0][2]:
            chosen.append(other)
    objects = []
    for shape, colour, motion in chosen:
        labels = {
            "shape": world.SHAPES[shape],
            "colour": tuple(world.COLOURS)[colour],
            "motion": world.MOTIONS[motion],
        }
        if full and not pair:
            labels["size"] = rng.choice(world.SIZES)
        objects.append(labels)
    background = rng.choice(tuple(world.BACKGROUNDS)) if full else None
    return Asked(
        prompt=plain(objects, background, language),
        language=language,
        objects=tuple(objects),
        background=background,
    )


def judge(frames: Tensor, asked: Sequence[Asked]) -> list[dict[str, bool]]:
    """frames uint8 [B, T, H, W, 3] and their prompts → for each clip, whether it keeps each thing
    that its prompt promises, and ``all``."""
    found: list[dict[str, bool]] = []
    for start in range(0, len(asked), _LOOKED_AT_ONCE):
        part = frames[start : start + _LOOKED_AT_ONCE]
        seen = _on_host(checker.look(part.movedim(-1, 1).float() / 255))
        for clip, one in enumerate(asked[start : start + _LOOKED_AT_ONCE]):
            found.append(_right(_only(seen, clip), one.promised()))
    return found


def _on_host(seen: checker.Seen) -> checker.Seen:
    return checker.Seen(**{name: value.cpu() for name, value in vars(seen).items()})


def _only(seen: checker.Seen, clip: int) -> checker.Seen:
    return checker.Seen(**{name: value[clip : clip + 1] for name, value in vars(seen).items()})


def _right(seen: checker.Seen, wanted: Mapping[str, Tensor]) -> dict[str, bool]:
    hits = {name: bool(hit) for name, hit in seen.right(wanted).items()}
    return hits | {"all": all(hits.values())}
