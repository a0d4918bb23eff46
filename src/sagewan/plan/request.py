"""What the user asks for: frozen, keyword-only, and refused with the fix when it is wrong.

Every field is one flag of the command line and, later, one widget of the app, matched by name.
A field left at None takes the preset's value, then the model's default.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sagewan.errors import RequestError
from sagewan.plan.lora import Lora
from sagewan.plan.modes import AUTO, MODES, PRESETS
from sagewan.plan.sparsity import Sparsity
from sagewan.plan.step_cache import StepCache

SCHEDULERS = ("unipc", "euler", "dpm++2m", "lcm", "flow-euler")
NO_QUANTIZATION = "none"
QUANTIZATIONS = (NO_QUANTIZATION, "fp8_scaled", "fp4_scaled", AUTO)
MAX_SIDE = 4096
MAX_FRAMES = 1001
MAX_STEPS = 1000
MAX_BLOCKS = 1000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Another mode for the first and last steps, written ``MODE:FIRST,LAST``."""

    mode: str
    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "Ends":
        mode, _, counts = text.partition(":")
        first, comma, last = counts.partition(",")
        if not (comma and first.isdecimal() and last.isdecimal()):
            raise RequestError(
                f"attention_ends={text}: write MODE:FIRST,LAST, such as sageattn_3:2,1"
            )
        return cls(mode=mode, first=int(first), last=int(last))

    def __str__(self) -> str:
        return f"{self.mode}:{self.first},{self.last}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make. Sizes are pixels (width, height); ``cfg_2`` and ``steps`` count as in Wan.

    Raises RequestError, one sentence with the fix, for anything that no model could do; what
    depends on the model (its grid, its tasks, the words it knows) is refused by the plan.
    """

    prompt: str
    negative: str | None = None
    model: str = "demo"
    image: Path | None = None
    last_image: Path | None = None
    output: Path = Path("sagewan.mp4")
    preset: str | None = None
    attention: str | None = None
    attention_ends: Ends | None = None
    attention_keep_layers: tuple[int, ...] = ()
    sparsity: Sparsity | None = None
    quantization: str | None = None
    block_swap: int | None = None
    cache: StepCache | None = None
    lora: tuple[Lora, ...] = ()
    steps: int | None = None
    cfg: float | None = None
    cfg_2: float | None = None
    boundary: float | None = None
    shift: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    strict: bool = False
    emulate: bool = False
    metadata: bool = True
    report: Path | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("prompt is empty: say what the video should show")
        _check_text("prompt", self.prompt)
        _check_text("negative", self.negative or "")
        self._check_names()
        self._check_numbers()
        self._check_pairs()

    def _check_names(self) -> None:
        modes = (*MODES, AUTO)
        _check_choice("attention", self.attention, modes)
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("preset", self.preset, PRESETS)
        _check_choice("scheduler", self.scheduler, SCHEDULERS)
        _check_choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        if self.attention_ends:
            _check_choice("attention_ends", self.attention_ends.mode, tuple(MODES))

    def _check_numbers(self) -> None:
        _check_range("block_swap", self.block_swap, 0, MAX_BLOCKS)
        _check_range("steps", self.steps, 1, MAX_STEPS)
        _check_range("cfg", self.cfg, 0, 100)
        _check_range("cfg_2", self.cfg_2, 0, 100)
        _check_range("boundary", self.boundary, 0, 1)
        _check_range("shift", self.shift, 0.01, 100)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("fps", self.fps, 1, 240)
        _check_range("frames", self.frames, 1, MAX_FRAMES)
        if self.frames is not None and self.frames % 4 != 1:
            raise RequestError(
                f"frames={self.frames}: Wan makes 4n+1 frames; try {_nearest_frames(self.frames)}"
            )
        for side in self.size or ():
            _check_range("size", side, 16, MAX_SIDE)

    def _check_pairs(self) -> None:
        if self.last_image and not self.image:
            raise RequestError("last_image needs image as well: give the first picture too")
        if self.last_image and self.frames == 1:
            raise RequestError("frames=1: a first and a last picture need at least 5 frames")
        if (self.attention_ends or self.attention_keep_layers) and self.attention is None:
            raise RequestError(
                "attention_ends and attention_keep_layers change a chosen mode: "
                "choose one with attention"
            )
        ends = self.attention_ends
        if ends and ends.first == ends.last == 0 and not self.attention_keep_layers:
            raise RequestError(
                f"attention_ends={ends} names no step: count the first or last ones, or name "
                "layers with attention_keep_layers"
            )
        if self.attention_keep_layers and not ends:
            raise RequestError(
                "attention_keep_layers needs attention_ends, which names the mode for those "
                "layers, such as sageattn_3:0,0"
            )


def parse_size(text: str) -> tuple[int, int]:
    """``1280x720`` → (1280, 720)."""
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise RequestError(f"size={text}: write WIDTHxHEIGHT, such as 1280x720")
    return int(width), int(height)


def parse_layers(text: str) -> tuple[int, ...]:
    """``0,39`` → (0, 39)."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise RequestError(f"attention_keep_layers={text}: write layer numbers, such as 0,39")
    return tuple(sorted({int(part) for part in parts}))


def unknown_choice(name: str, value: str, choices: Iterable[str]) -> RequestError:
    """The refusal of a name that is none of the choices, with the nearest one if it is near."""
    choices = tuple(choices)
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return RequestError(f"{name}={value}: {hint}choose from {', '.join(choices)}")


def _check_text(name: str, text: str) -> None:
    # Bytes that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(f"{name} is not valid Unicode: type it again, or save it as UTF-8")


def _check_choice(name: str, value: str | None, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value is not None and value not in choices:
        raise unknown_choice(name, value, choices)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    # "not (…)" also refuses NaN, which compares false with everything.
    if value is not None and not low <= value <= high:
        raise RequestError(f"{name}={value}: it must be from {low} to {high}")


def _nearest_frames(frames: int) -> int:
    # Of two as near, the longer: one frame is no video.
    return (frames + 1) // 4 * 4 + 1
