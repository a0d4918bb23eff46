"""What the sums are made of."""

from dataclasses import dataclass

from sagewan.plan.decoding import Decoding, plan_decoding
from sagewan.plan.hardware import Device
from sagewan.plan.models import Model
from sagewan.plan.request import Request


@dataclass(frozen=True, kw_only=True)
class Needs:
    """One video. ``weight_bytes`` are those of one transformer, ``lora_bytes`` of what lies beside
    them; the size is (width, height), on the grid. A step makes a pass for each of ``texts``.
    ``packed`` weights are unpacked, one matrix at a time, by some rows; ``file_backed`` ones stay
    in the pages of their files where they are not pinned; ``keeps_residuals`` says that a step
    cache keeps what the blocks add, for each text."""

    request: Request
    model: Model
    device: Device
    dtype: str
    grid_size: tuple[int, int]
    frames: int
    weight_bytes: int
    lora_bytes: int
    quantised_attention: bool
    texts: int = 1
    packed: bool = False
    file_backed: bool = True
    keeps_residuals: bool = False

    @property
    def on_device(self) -> bool:
        """Whether it runs on a GPU: on a CPU all that it takes is the host's."""
        return self.device.is_cuda

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
