"""Activations as FP8 products take them: a value that needs torch alone to be named."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of activations as FP8: row m is ``data[m] · scale[m]``.

    data float8_e4m3fn [..., K], scale float32 [..., 1]; ``norm`` float32 [..., 1] is the length of
    each row, where a product wants to know how large its results may be.
    """

    data: Tensor
    scale: Tensor
    norm: Tensor | None = None

    @classmethod
    def empty(cls, *shape: int, device: torch.device, norm: bool = False) -> "Fp8Rows":
        """Rows of this shape, to be written, with their ``norm`` or without."""
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scale, length = (
            torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device) if wanted else None
            for wanted in (True, norm)
        )
        assert scale is not None
        return cls(data, scale, length)

    @classmethod
    def within(cls, x: Tensor, scale: Tensor) -> "Fp8Rows":
        """Rows of the shape of x [B, N, K], 16 bit without gaps, in its memory, which nothing else
        needs any more; scale [B] float32 is all rows'."""
        batch, tokens, _ = x.shape
        data = x.view(torch.float8_e4m3fn).flatten()[: x.numel()].view(x.shape)
        return cls(data, scale.view(batch, 1, 1).expand(batch, tokens, 1).contiguous())

    def tokens(self, start: int, stop: int) -> "Fp8Rows":
        """Of rows [B, N, K], the tokens from start to stop: a view."""
        norm = None if self.norm is None else self.norm[:, start:stop]
        return Fp8Rows(self.data[:, start:stop], self.scale[:, start:stop], norm)

    @property
    def aligned_scale(self) -> Tensor:
        """The scale where cuBLASLt can read it, at a multiple of 16 bytes: a run of tokens may
        begin anywhere."""
        return self.scale if self.scale.data_ptr() % 16 == 0 else self.scale.clone()
