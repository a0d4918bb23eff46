"""What is generated: its task, its size and length, on the model's grid."""

from dataclasses import dataclass
from math import prod

from sagewan.errors import RequestError
from sagewan.plan.models import FIRST_LAST_FRAME, IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Model
from sagewan.plan.modes import Preset
from sagewan.plan.request import Request

# The rotary table of Wan has 1024 positions a side; beyond this many tokens nothing was tried.
MAX_TOKENS = 500_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes are (width, height): ``size`` is delivered, ``grid_size`` generated; ``token_grid`` is
    (frames, rows, columns) of tokens."""

    size: tuple[int, int]
    grid_size: tuple[int, int]
    frames: int
    fps: int
    token_grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return prod(self.token_grid)


def plan_shape(request: Request, model: Model, preset: Preset | None) -> Shape:
    """What the request names, else the preset or the model. Raises RequestError for what is not on
    the model's grid, or too large."""
    # A preset's size and length are meant for the published models, not for the small demo.
    usual = preset if preset and not model.is_demo else model.sampling
    size = request.size or usual.size
    frames = request.frames or usual.frames
    across, down = model.grid
    if size[0] < across or size[1] < down:
        raise RequestError(
            f"size={size[0]}x{size[1]} is below the grid of {model.name}: "
            f"the smallest is {across}x{down}"
        )
    if (frames - 1) % model.temporal:
        raise RequestError(f"frames={frames}: {model.name} makes {model.temporal}n+1 frames")
    grid_size = -(-size[0] // across) * across, -(-size[1] // down) * down
    shape = Shape(
        size=size,
        grid_size=grid_size,
        frames=frames,
        fps=request.fps or model.sampling.fps,
        token_grid=model.token_grid(grid_size, frames),
    )
    if shape.tokens > MAX_TOKENS:
        raise RequestError(
            f"size={size[0]}x{size[1]} with frames={frames} makes {shape.tokens} tokens; "
            f"more than {MAX_TOKENS} is refused: choose a smaller size or fewer frames"
        )
    return shape


def plan_task(request: Request, model: Model) -> str:
    """What the model makes of the pictures there are. Raises RequestError where it can't."""
    if request.last_image:
        if FIRST_LAST_FRAME in model.tasks:
            return FIRST_LAST_FRAME
        takes = "only a first picture" if IMAGE_TO_VIDEO in model.tasks else "no pictures"
        raise RequestError(f"last_image: the model {model.name} takes {takes}; leave it out")
    if request.image:
        if IMAGE_TO_VIDEO in model.tasks:
            return IMAGE_TO_VIDEO
        if FIRST_LAST_FRAME in model.tasks:
            raise RequestError(
                f"last_image is missing: the model {model.name} needs a first and a last picture"
            )
        raise RequestError(
            f"image: the model {model.name} makes videos from text alone; leave it out, or choose "
            "an image-to-video model"
        )
    if TEXT_TO_VIDEO in model.tasks:
        return TEXT_TO_VIDEO
    raise RequestError(f"image is missing: the model {model.name} starts from a picture")
