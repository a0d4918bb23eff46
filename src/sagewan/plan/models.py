"""What the Wan models are, as plain values: shapes, tasks, grids and sampling defaults.

The published models are listed here; for a folder the same values are read from its configs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType

TEXT_TOKENS = 512
TEXT_TO_VIDEO = "t2v"
IMAGE_TO_VIDEO = "i2v"
FIRST_LAST_FRAME = "flf2v"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings a model was published with. ``cfg_2`` guides the low-noise expert."""

    size: tuple[int, int] = (832, 480)
    frames: int = 81
    fps: int = 16
    steps: int = 50
    cfg: float = 5.0
    cfg_2: float | None = None
    shift: float = 5.0
    scheduler: str = "unipc"
    negative: str = ""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One Wan model. Widths count features, ``parameters`` those of one transformer.

    ``location`` is where its files are, None if only its name is known; ``parts`` the file or
    folder of each of its parts, by diffusers' names; ``quantized`` the format of the matrices that
    its transformer's file holds quantised, None if they are plain; ``dtypes`` what most bytes of a
    part's files are stored in, where they were looked at; ``notes`` sentences on what was made of
    them; ``measured`` the file of what was measured of a transformer's inputs, by the name of its
    part; ``spatial`` and ``temporal`` how many pixels and frames make one latent; ``patch``
    the transformer's patch (frames, rows, columns); ``experts`` is 2 for Wan 2.2 A14B, which
    changes from the high-noise to the low-noise transformer at ``boundary`` of the noise scale;
    ``expand_timesteps`` marks TI2V, where every token has its own time; ``words`` the only words a
    small model was taught, by kind (empty: any).
    """

    name: str
    family: str
    tasks: tuple[str, ...]
    layers: int
    heads: int
    head_dim: int = 128
    ffn: int
    in_channels: int = 16
    latent_channels: int = 16
    spatial: int = 8
    temporal: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    image_encoder: bool = False
    expand_timesteps: bool = False
    experts: int = 1
    boundary: float | None = None
    parameters: int
    sampling: Sampling = field(default_factory=Sampling)
    location: Path | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
    quantized: str | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measured: Mapping[str, Path] = field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Width and height are generated in multiples of these pixels."""
        return self.spatial * self.patch[2], self.spatial * self.patch[1]

    def made_anew(self, part: str, dtype: str) -> bool:
        """Whether a part's weights, wanted in this dtype, can't stay in the pages of its files."""
        return self.dtypes.get(part, dtype) != dtype

    @property
    def is_demo(self) -> bool:
        return self.family == "demo"

    def tokens(self, size: tuple[int, int], frames: int) -> int:
        """Tokens of one forward pass for a size on the grid."""
        return prod(self.token_grid(size, frames))

    def token_grid(self, size: tuple[int, int], frames: int) -> tuple[int, int, int]:
        """The (frames, rows, columns) of tokens for a size on the grid."""
        latent_frames = (frames - 1) // self.temporal + 1
        across, down = self.grid
        return latent_frames // self.patch[0], size[1] // down, size[0] // across


_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

_PUBLISHED = (
    Model(
        name="wan2.1-t2v-1.3b",
        family="wan2.1",
        tasks=(TEXT_TO_VIDEO,),
        layers=30,
        heads=12,
        ffn=8960,
        parameters=1_418_996_800,
        sampling=Sampling(shift=5.0, negative=_WAN_NEGATIVE),
    ),
    Model(
        name="wan2.1-t2v-14b",
        family="wan2.1",
        tasks=(TEXT_TO_VIDEO,),
        layers=40,
        heads=40,
        ffn=13824,
        parameters=14_288_491_584,
        sampling=Sampling(size=(1280, 720), negative=_WAN_NEGATIVE),
    ),
    Model(
        name="wan2.1-i2v-14b",
        family="wan2.1",
        tasks=(IMAGE_TO_VIDEO,),
        layers=40,
        heads=40,
        ffn=13824,
        in_channels=36,
        image_encoder=True,
        parameters=16_394_878_784,
        sampling=Sampling(steps=40, shift=3.0, negative=_WAN_NEGATIVE),
    ),
    Model(
        name="wan2.1-flf2v-14b",
        family="wan2.1",
        tasks=(FIRST_LAST_FRAME,),
        layers=40,
        heads=40,
        ffn=13824,
        in_channels=36,
        image_encoder=True,
        parameters=16_395_536_704,
        sampling=Sampling(size=(1280, 720), shift=16.0, negative=_WAN_NEGATIVE),
    ),
    Model(
        name="wan2.2-t2v-a14b",
        family="wan2.2",
        tasks=(TEXT_TO_VIDEO,),
        layers=40,
        heads=40,
        ffn=13824,
        experts=2,
        boundary=0.875,
        parameters=14_288_491_584,
        sampling=Sampling(
            size=(1280, 720), steps=40, cfg=4.0, cfg_2=3.0, shift=12.0, negative=_WAN_NEGATIVE
        ),
    ),
    Model(
        name="wan2.2-i2v-a14b",
        family="wan2.2",
        tasks=(IMAGE_TO_VIDEO, FIRST_LAST_FRAME),
        layers=40,
        heads=40,
        ffn=13824,
        in_channels=36,
        experts=2,
        boundary=0.9,
        parameters=14_288_901_184,
        sampling=Sampling(
            size=(1280, 720), steps=40, cfg=3.5, cfg_2=3.5, shift=5.0, negative=_WAN_NEGATIVE
        ),
    ),
    Model(
        name="wan2.2-ti2v-5b",
        family="wan2.2",
        tasks=(TEXT_TO_VIDEO, IMAGE_TO_VIDEO),
        layers=30,
        heads=24,
        ffn=14336,
        in_channels=48,
        latent_channels=48,
        spatial=16,
        expand_timesteps=True,
        parameters=4_999_787_712,
        sampling=Sampling(
            size=(1280, 704), frames=121, fps=24, cfg=5.0, shift=5.0, negative=_WAN_NEGATIVE
        ),
    ),
)

PUBLISHED: Mapping[str, Model] = MappingProxyType({model.name: model for model in _PUBLISHED})
DEMO = "demo"
