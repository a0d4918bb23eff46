"""LoRA files as values: what was asked for, what a file holds, and the schedule it was taught."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagewan.errors import RequestError

# The experts of Wan 2.2 A14B, in the order of their transformers.
EXPERTS = ("high", "low")
MAX_STRENGTH = 10.0

_FORM = re.compile(r"(?:(?P<expert>\w+)=)?(?P<path>.+?)(?::(?P<strength>[+-]?\d*\.?\d+))?")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA to use, written ``FILE``, ``FILE:0.8``, or ``high=FILE:0.8`` for one expert."""

    path: Path
    strength: float = 1.0
    expert: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Lora":
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise RequestError(f"lora={text}: write FILE or FILE:STRENGTH, such as a.safetensors:1")
        strength = float(found["strength"] or 1)
        if abs(strength) > MAX_STRENGTH:
            raise RequestError(f"lora={text}: the strength must be from -10 to 10")
        expert, path = found["expert"], found["path"]
        if expert is not None and expert not in EXPERTS:
            # A file may well have = in its name.
            expert, path = None, f"{expert}={path}"
        return cls(path=Path(path), strength=strength, expert=expert)

    def __str__(self) -> str:
        expert = f"{self.expert}=" if self.expert else ""
        # Always with its strength: what follows a colon in the file's own name is not one.
        return f"{expert}{self.path}:{self.strength:g}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The sampling that a distilled model was taught; it is poor at any other."""

    steps: int
    cfg: float = 1.0
    shift: float = 5.0
    scheduler: str = "euler"


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a LoRA file holds for the model of a run, read from its header.

    ``layers`` are the names of the layers it changes, as diffusers calls them; ``unmatched`` the
    names in the file that no layer of the model answers to. ``experts`` counts the transformers it
    is for, from 0; ``guessed`` says whether its name told that. ``schedule`` is set for a distilled
    one. ``nbytes`` is what it takes in memory; ``modified`` when the file was written, in
    nanoseconds, so that one that was written anew counts as another.
    """

    lora: Lora
    layers: tuple[str, ...]
    unmatched: tuple[str, ...]
    experts: tuple[int, ...]
    guessed: bool = False
    rank: int
    nbytes: int
    modified: int = 0
    schedule: Schedule | None = None

    def sentence(self) -> str:
        """``style.safetensors at 0.8, rank 8: changes 48 layers``, and what of it did not fit."""
        counted = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        text = f"LoRA {self.lora.path.name} at {self.lora.strength:g}, rank {self.rank}: "
        text += f"changes {counted}"
        if self.guessed or self.lora.expert:
            how = ", by its name" if self.guessed else ""
            text += f" of the {EXPERTS[self.experts[0]]}-noise expert{how}"
        if self.unmatched:
            text += f"; {len(self.unmatched)} of its names fit nothing here ({self.unmatched[0]}"
            text += ", …)" if len(self.unmatched) > 1 else ")"
        return text

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.lora.path),
            "strength": self.lora.strength,
            "rank": self.rank,
            "layers": len(self.layers),
            "unmatched": list(self.unmatched),
            "experts": list(self.experts),
            "distilled": self.schedule is not None,
        }


# How the makers of distilled models name them. The number of steps is in most of the names.
_DISTILLED = re.compile(r"lightx2v|lightning|distill|fastwan|causvid|\b\d{1,2}[-_ ]?steps?", re.I)
_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?", re.I)
_USUAL_STEPS = 4


def schedule_in_name(name: str) -> Schedule | None:
    """The schedule of a distilled LoRA as far as its file's name tells; None if it does not."""
    spaced = name.replace("_", " ").replace("-", " ")
    if not _DISTILLED.search(spaced):
        return None
    steps = _STEPS.search(spaced)
    return Schedule(steps=int(steps[1]) if steps else _USUAL_STEPS)


def expert_in_name(name: str) -> int | None:
    """0 or 1 where a file's name says the high-noise or the low-noise expert, and only one."""
    found = set(re.findall(r"(?<![a-z])(high|low)(?=[-_ .]?noise|[^a-z]|$)", name.lower()))
    return EXPERTS.index(found.pop()) if len(found) == 1 else None


def taught_schedule(steps: int | None, loras: Iterable[LoraFile]) -> Schedule | None:
    """The schedule that the LoRAs of a run want, if one of them is distilled. One that says nothing
    of itself is taken for distilled if it is asked for with 4 steps, which no other works with."""
    loras = tuple(loras)
    told = next((file.schedule for file in loras if file.schedule), None)
    if told is None and loras and steps == _USUAL_STEPS:
        return Schedule(steps=_USUAL_STEPS)
    return told
