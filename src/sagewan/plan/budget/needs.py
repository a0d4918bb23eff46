"""What the sums are made of."""

from dataclasses import dataclass
from functools import cached_property

from sagewan.plan.decoding import Decoding, plan_decoding
from sagewan.plan.hardware import Device
from sagewan.plan.models import Model
from sagewan.plan.request import Request
from sagewan.plan.weights import weight_bytes


@dataclass(frozen=True, kw_only=True)
class Needs:
    """One video. The size is (width, height), on the grid; ``format`` is what the transformer's
    matrices are packed in, None where they are plain; ``lora_bytes`` lie beside them. A step makes
    a pass for each of ``texts``; ``keeps_residuals`` says that a step cache keeps what the blocks
    add, for each; where ``segments_grow``, less of the device is lost between tensors."""

    request: Request
    model: Model
    device: Device
    dtype: str
    grid_size: tuple[int, int]
    frames: int
    format: str | None
    lora_bytes: int
    quantised_attention: bool
    texts: int = 1
    keeps_residuals: bool = False
    segments_grow: bool = False

    @property
    def on_device(self) -> bool:
        """Whether it runs on a GPU: on a CPU all that it takes is the host's."""
        return self.device.is_cuda

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one transformer."""
        return weight_bytes(self.model, self.dtype, self.format)

    @property
    def file_backed(self) -> bool:
        """Whether the transformer's weights are used as its files have them: where they are not
        pinned, they stay in the files' pages."""
        own = self.model.quantized
        return self.format == own and not (
            own is None and self.model.made_anew("transformer", self.dtype)
        )

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in the plan's dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.model.tokens(self.grid_size, self.frames)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        width, height = self.grid_size
        frames = (self.frames - 1) // self.model.temporal + 1
        return frames, height // self.model.spatial, width // self.model.spatial

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.shape[1:]

    @property
    def decoding(self) -> Decoding:
        return plan_decoding(self.device, self.dtype, self.grid_size)
