"""Number formats bit for bit, in plain torch: INT8, FP8 e4m3, NVFP4, and the rotation before them.

Ties round to even, as the hardware's conversions do; values beyond a format saturate.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127.0
E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_GROUP = 16
_HALVES = 1.5 * 2.0**22
_TWO_DIGITS = 2.0**22 + 1


@dataclass(frozen=True)
class Scaled:
    """Values of a low format, held in float32, and the scale that broadcasts to them."""

    data: Tensor
    scale: Tensor

    def value(self) -> Tensor:
        return self.data * self.scale


def int8(x: Tensor, rows: int, *, along: bool = False) -> Scaled:
    """[..., N, D] → integers −127…127 with one float32 scale per ``rows`` rows.

    ``along``: each row is stretched by as much as its rounding, tried before, shortens it along
    itself, or half of that more or less, so that its error has little of its own direction."""
    count = x.shape[-2]
    blocks = F.pad(x.float(), (0, 0, 0, -count % rows)).unflatten(-2, (-1, rows))
    scale = _nonzero(blocks.abs().amax((-2, -1), keepdim=True) / INT8_MAX)
    scale = scale.expand(*blocks.shape[:-1], 1).flatten(-3, -2)[..., :count, :]
    values = x.float() / scale
    if along:
        values = _stretched(values)
    return Scaled(values.round().clamp(-INT8_MAX, INT8_MAX), scale)


def _stretched(rows: Tensor) -> Tensor:
    squares = (rows * rows).sum(-1, keepdim=True).clamp(min=1e-30)
    over = ((rows.round() - rows) * rows).sum(-1, keepdim=True) / squares
    tried = torch.stack([rows * (1 - share * over) for share in (1.0, 0.5, 1.5)])
    errors = ((tried.round() - rows) * rows).sum(-1, keepdim=True).abs()
    best = errors.argmin(0, keepdim=True).expand_as(tried[:1])
    return tried.gather(0, best).squeeze(0)


def e4m3(x: Tensor) -> Tensor:
    """Any shape → the nearest values of FP8 e4m3, in float32; beyond ±448 it saturates."""
    # torch's own conversion turns what overflows into NaN.
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def e4m3_per_row(x: Tensor) -> Scaled:
    """[..., D] → e4m3 values with one float32 scale for each row of D."""
    scale = _nonzero(x.float().abs().amax(-1, keepdim=True) / E4M3_MAX)
    return Scaled(e4m3(x.float() / scale), scale)


def e4m3_per_channel(x: Tensor) -> Scaled:
    """[..., N, D] → e4m3 values with one float32 scale for each of the D channels."""
    scale = _nonzero(x.float().abs().amax(-2, keepdim=True) / E4M3_MAX)
    return Scaled(e4m3(x.float() / scale), scale)


def e2m1(x: Tensor) -> Tensor:
    """Any shape → the nearest of 0, ½, 1, 1½, 2, 3, 4, 6 with sign, in float32; saturates."""
    x = x.float()
    size = x.abs().clamp_(max=E2M1_MAX)
    # Sums of this size are multiples of ½; and what is cut off here leaves two digits. Both are the
    # processor's own rounding.
    halves = (size + _HALVES).sub_(_HALVES)
    shifted = size * _TWO_DIGITS
    digits = shifted - (shifted - size)
    return torch.where(size < 2, halves, digits).copysign_(x)


def nvfp4(x: Tensor, global_scale: Tensor | None = None) -> Scaled:
    """[..., D] → e2m1 values, one e4m3 scale per 16 along D, times a float32 global scale.

    ``global_scale`` broadcasts to x [..., 1]; by default one for each matrix [N, D], so that the
    largest e4m3 scale is 448. D need not be a multiple of 16.
    """
    x = x.float()
    if global_scale is None:
        global_scale = _nonzero(x.abs().amax((-2, -1), keepdim=True) / (E4M3_MAX * E2M1_MAX))
    size = x.shape[-1]
    groups = F.pad(x / global_scale, (0, -size % NVFP4_GROUP)).unflatten(-1, (-1, NVFP4_GROUP))
    scale = e4m3(groups.abs().amax(-1, keepdim=True) / E2M1_MAX)
    # A group whose scale rounds to zero holds only zeros.
    data = torch.where(scale > 0, e2m1(groups / _nonzero(scale)), 0.0)
    scale = scale.expand_as(groups).flatten(-2)[..., :size]
    return Scaled(data.flatten(-2)[..., :size], scale * global_scale)


def power_of_two_scale(top: Tensor, least: float = 2.0**-30) -> Tensor:
    """Largest magnitudes → the power of two that brings each within NVFP4's 448·6, at least
    ``least``: a global scale that changes no digit of what it scales."""
    wanted = (top.float() / (E4M3_MAX * E2M1_MAX)).clamp(min=least)
    mantissa, exponent = wanted.frexp()
    # frexp's mantissa is half for a power of two.
    return torch.ldexp(torch.ones_like(wanted), exponent - (mantissa == 0.5).int())


def nvfp4_rows(x: Tensor, rows: int = 128) -> Scaled:
    """[..., N, D] → NVFP4 with one global scale, a power of two, for each ``rows`` rows."""
    count = x.shape[-2]
    blocks = F.pad(x.float(), (0, 0, 0, -count % rows)).unflatten(-2, (-1, rows))
    scale = power_of_two_scale(blocks.abs().amax((-2, -1)))
    return nvfp4(x, scale.repeat_interleave(rows, -1)[..., :count, None])


def rotate(x: Tensor) -> Tensor:
    """[..., D] → x·S·H, orthogonal: signs, and Hadamard matrices of the largest power of two in D
    (up to 128).

    Spreads an outlying channel over the others; rotating q and k alike keeps their products. The
    signs are those of a bent function: without them a constant row would end in one channel.
    """
    size = min(128, x.shape[-1] & -x.shape[-1])
    index = torch.arange(size, device=x.device)
    pairs = [(index >> bit) & (index >> (bit + 1)) & 1 for bit in (0, 2, 4, 6)]
    odd = torch.stack(pairs).sum(0) % 2
    matrix = (1 - 2 * odd)[:, None] * hadamard(size, x.device)
    rotated: Tensor = x.float().unflatten(-1, (-1, size)) @ matrix
    return rotated.flatten(-2)


def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix [size, size] in float32; size a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _nonzero(scale: Tensor) -> Tensor:
    """A scale that can divide: blocks of zeros take 1."""
    return torch.where(scale > 0, scale, 1.0)
