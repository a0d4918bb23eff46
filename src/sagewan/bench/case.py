"""What is measured: which Wan's widths, and how many tokens of which picture."""

from dataclasses import dataclass, replace
from math import prod

from sagewan.errors import RequestError
from sagewan.plan.layers import Layer, Role, block_layers
from sagewan.plan.models import PUBLISHED, TEXT_TOKENS, Model
from sagewan.plan.request import parse_size, unknown_choice

SIZES = {"480p": (832, 480), "720p": (1280, 720)}
SHORT = {"1.3b": "wan2.1-t2v-1.3b", "5b": "wan2.2-ti2v-5b", "14b": "wan2.1-t2v-14b"}
# For a CPU: a model of two layers and two heads, in which everything runs.
TINY = replace(
    PUBLISHED["wan2.1-t2v-1.3b"], name="tiny", layers=2, heads=2, ffn=512, parameters=2_000_000
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Random weights of a model's widths, on latents of so many (frames, rows, columns)."""

    model: Model
    latents: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.model.patch
        return prod(self.latents) // (frames * rows * columns)

    @property
    def width(self) -> int:
        return self.model.heads * self.model.head_dim

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The matrices of one block."""
        return block_layers(self.model)

    def rows(self, layer: Layer) -> int:
        """How many rows of activations one of the block's matrices multiplies."""
        return TEXT_TOKENS if layer.role == Role.CROSS_KEY_VALUE else self.tokens

    def long(self, tokens: int) -> "Case":
        """The same picture, for as many frames as come nearest to so many tokens."""
        frames, rows, columns = self.latents
        count = max(1, round(tokens * frames / self.tokens))
        return replace(self, latents=(count, rows, columns))


def model_of(name: str) -> Model:
    """A published model by its name, or by 1.3b, 5b, 14b or tiny."""
    known = {**PUBLISHED, **{short: PUBLISHED[full] for short, full in SHORT.items()}, "tiny": TINY}
    if name not in known:
        raise unknown_choice("model", name, known)
    model = known[name]
    if model.image_encoder:
        # The picture's tokens are 257 more in cross-attention: nothing that a step's time shows.
        return replace(model, image_encoder=False)
    return model


def case_of(model: Model, size: str, frames: int, tokens: int | None = None) -> Case:
    """``480p``, ``720p`` or WIDTHxHEIGHT, and frames of video, or about so many tokens instead. A
    size off the model's grid becomes the next one on it, as in a run."""
    if frames % 4 != 1:
        raise RequestError(f"frames={frames}: Wan makes 4n+1 frames; try {frames // 4 * 4 + 1}")
    width, height = SIZES[size] if size in SIZES else parse_size(size)
    if min(width, height) < 1:
        raise RequestError(f"size={size}: write WIDTHxHEIGHT, such as 832x480")
    across, down = model.grid
    rows, columns = -(-height // down) * model.patch[1], -(-width // across) * model.patch[2]
    case = Case(model=model, latents=((frames - 1) // model.temporal + 1, rows, columns))
    return case if tokens is None else case.long(tokens)
