"""Activations as FP8 products take them: a value that needs torch alone to be named."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of activations as FP8: row m is ``data[m] · scale[m]``.

    data float8_e4m3fn [..., K], scale float32 [..., 1].
    """

    data: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> "Fp8Rows":
        """Rows of this shape, to be written."""
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return cls(data, torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device))

    def tokens(self, start: int, stop: int) -> "Fp8Rows":
        """Of rows [B, N, K], the tokens from start to stop: a view."""
        return Fp8Rows(self.data[:, start:stop], self.scale[:, start:stop])
