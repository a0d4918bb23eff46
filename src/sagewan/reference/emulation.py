"""The quantised modes of attention, emulated with their exact formats on any device.

One loop, :func:`_online_softmax`, runs over blocks of keys as a kernel does, because P is rounded
block by block: ``block_n`` and the order of the keys change the last digits. Products are float32
matmuls of values that are exact in their formats. After SageAttention (arXiv:2410.02367),
SageAttention2 (arXiv:2411.10958) and SageAttention3 (arXiv:2505.11594).

All functions: q [B, H, N, D], k and v [B, Hk, M, D] with H a multiple of Hk, any float dtype
→ [B, H, N, D] in q's dtype; with ``return_lse`` also the log-sum-exp [B, H, N] in float32.
``scale`` defaults to D**-0.5; ``block_mask`` [B or 1, H or 1, ⌈N/128⌉, ⌈M/128⌉] bool is true for
the blocks that are attended to, whose rows and keys are multiples of ``block_m`` and ``block_n``; a
row without any is zero. Inputs are never changed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.reference import formats
from sagewan.reference.attention import BLOCK

_SCORES = 2**24
# Below every score, and far from the end of float32.
_LOWEST = -1e30
# A score so many powers of two above all before it is a peak: what is far below it is to count too.
_LEAP = 4.0

Round = Callable[[Tensor], Tensor]
Result = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Operands in their formats, as float32. q [B, H, N, D] holds scale·log₂e; k, v [B, Hk, M, D].

    ``q_means`` [B, H, blocks, D] are what was subtracted from each ``block_m`` rows of q, and
    ``k_exact`` the smoothed, unrounded k that they are multiplied with.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_exact: Tensor
    q_means: Tensor | None = None


@dataclass(frozen=True)
class _Walk:
    """How queries and keys are walked through: by so many rows and keys, and past the blocks that
    the mask leaves out; ``allowed`` [B or 1, H or 1, rows, ⌈M/128⌉] is the mask of some rows. With
    ``own_place`` and no mask, from the keys at the place of each ``BLOCK`` queries on, ``first``. P
    is relative to a limit of its row's scores, which rises where one is above it: to that score
    and, unless it is above by more than ``_LEAP``, ``headroom`` powers of two more.
    """

    block_m: int
    block_n: int
    block_mask: Tensor | None = None
    allowed: Tensor | None = None
    own_place: bool = False
    headroom: int = 0
    first: int = 0

    def of_rows(self, start: int, count: int) -> "_Walk":
        """The walk for the rows of queries from ``start``."""
        if self.block_mask is None:
            return replace(self, first=start // BLOCK * BLOCK) if self.own_place else self
        allowed = self.block_mask.repeat_interleave(BLOCK, 2)[:, :, start:count]
        return replace(self, allowed=allowed)

    def starts(self, keys: int) -> list[int]:
        """Where the blocks of keys begin, in their order."""
        starts = list(range(0, keys, self.block_n))
        first = self.first // self.block_n if self.first < keys else 0
        return starts[first:] + starts[:first]

    def masked(self, scores: Tensor, start: int) -> Tensor:
        """Scores [B, H, rows, N] of the keys from ``start``, minus infinity where left out."""
        if self.allowed is None:
            return scores
        allowed = self.allowed[:, :, : scores.shape[2], start // BLOCK, None]
        return scores.masked_fill(~allowed, -math.inf)


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    block_m: int = 128,
    block_n: int = 64,
    rows_per_scale: int = 128,
    keys_per_scale: int = 64,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Result:
    """INT8 Q·Kᵀ, K minus its mean, 16-bit P·V. ``rows_per_scale`` rows of Q and
    ``keys_per_scale`` keys share a scale."""
    scaled, smooth = _scale(q, scale), _minus_mean(k)
    sixteen = _sixteen_bit(q)
    operands = _Prepared(
        q=formats.int8(scaled, rows_per_scale).value(),
        k=formats.int8(smooth, keys_per_scale).value(),
        v=sixteen(v),
        k_exact=smooth,
    )
    result = _online_softmax(operands, sixteen, _Walk(block_m, block_n, block_mask))
    return _finish(q, k, scaled, result, return_lse)


def sageattn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    block_m: int = 128,
    block_n: int = 64,
    rows_per_scale: int = 128,
    keys_per_scale: int = 64,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Result:
    """As :func:`sageattn`, Q smoothed too, both rotated, and keys rounded with little error along
    themselves."""
    scaled, sixteen = _scale(q, scale), _sixteen_bit(q)
    shared = (rows_per_scale, keys_per_scale)
    operands = _fine_int8(scaled, k, sixteen(v), block_m, shared, along=True)
    result = _online_softmax(operands, sixteen, _Walk(block_m, block_n, block_mask))
    return _finish(q, k, scaled, result, return_lse)


def sageattn_3_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    block_m: int = 128,
    block_n: int = 64,
    rows_per_scale: int = 128,
    keys_per_scale: int = 64,
    rounded_sums: bool = False,
    own_place: bool = False,
    headroom: int = 0,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Result:
    """Q·Kᵀ as :func:`sageattn_3`, but for how keys are rounded; P·V in e4m3, P times 448 and V
    scaled per channel. ``rounded_sums`` divides by the sums of P as rounded;
    ``own_place`` begins with the keys at the place of each 128 queries, if no mask lists them;
    where a row's maximum rises little by little, P is relative to ``headroom`` powers of two above
    it."""
    scaled = _scale(q, scale)
    values = formats.e4m3_per_channel(v).value()
    operands = _fine_int8(scaled, k, values, block_m, (rows_per_scale, keys_per_scale))
    sums = _p_e4m3 if rounded_sums else None
    walk = _Walk(block_m, block_n, block_mask, own_place=own_place, headroom=headroom)
    result = _online_softmax(operands, _p_e4m3, walk, round_sum=sums)
    return _finish(q, k, scaled, result, return_lse)


def sageattn_3_fp4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    block_m: int = 128,
    block_n: int = 64,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Result:
    """NVFP4 in both products: Q smoothed per block, K by its mean, P scaled at two levels."""
    scaled, smooth = _scale(q, scale), _minus_mean(k)
    centred, q_means = _minus_block_means(scaled, block_m)
    operands = _Prepared(
        q=formats.nvfp4_rows(centred).value(),
        k=formats.nvfp4_rows(smooth).value(),
        v=_nvfp4_columns(v),
        k_exact=smooth,
        q_means=q_means,
    )
    result = _online_softmax(operands, _p_nvfp4, _Walk(block_m, block_n, block_mask))
    return _finish(q, k, scaled, result, return_lse)


def _nvfp4_columns(v: Tensor) -> Tensor:
    """V in NVFP4 with a global scale for each channel; groups run along the keys, which P·V sums
    over."""
    channels = v.float().mT
    scale = formats.power_of_two_scale(channels.abs().amax(-1, keepdim=True), 2.0**-120)
    return formats.nvfp4(channels, scale).value().mT


def _fine_int8(
    scaled: Tensor,
    k: Tensor,
    v: Tensor,
    block_m: int,
    rows_per_scale: tuple[int, int],
    *,
    along: bool = False,
) -> _Prepared:
    """``rows_per_scale`` of Q and of K; ``along`` is how keys are rounded."""
    smooth, rotated = formats.rotate(_minus_mean(k)), formats.rotate(scaled)
    q_mean = rotated.mean(-2, keepdim=True)
    return _Prepared(
        q=formats.int8(rotated - q_mean, rows_per_scale[0]).value(),
        k=formats.int8(smooth, rows_per_scale[1], along=along).value(),
        v=v,
        k_exact=smooth,
        q_means=q_mean.expand(-1, -1, -(-rotated.shape[-2] // block_m), -1),
    )


def _scale(q: Tensor, scale: float | None) -> Tensor:
    """q in float32 times the softmax scale and log₂e, so that exponentials are powers of two."""
    return q.float() * ((q.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e))


def _minus_mean(k: Tensor) -> Tensor:
    return k.float() - k.float().mean(-2, keepdim=True)


def _minus_block_means(q: Tensor, block_m: int) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D] minus the mean of each ``block_m`` rows, and those means [B, H, blocks, D]."""
    count = q.shape[-2]
    blocks = F.pad(q, (0, 0, 0, -count % block_m)).unflatten(-2, (-1, block_m))
    rows = torch.full((blocks.shape[-3], 1), float(block_m), device=q.device)
    rows[-1] -= -count % block_m
    means = blocks.sum(-2) / rows
    return q - means.repeat_interleave(block_m, -2)[..., :count, :], means


def _sixteen_bit(q: Tensor) -> Round:
    """Rounding to the 16-bit format that P·V multiplies in: q's own, float16 for wider inputs."""
    dtype = q.dtype if q.dtype in (torch.float16, torch.bfloat16) else torch.float16
    return lambda x: x.to(dtype).float()


def _p_e4m3(p: Tensor) -> Tensor:
    # P is at most 1: times 448 it uses the whole range and small probabilities don't underflow.
    return formats.e4m3(p * formats.E4M3_MAX) / formats.E4M3_MAX


def _p_nvfp4(p: Tensor) -> Tensor:
    # Level one takes each row's maximum to 448·6, so that level two, e4m3, uses its whole range.
    top = p.amax(-1, keepdim=True).clamp(min=1e-30)
    return formats.nvfp4(p, top / (formats.E4M3_MAX * formats.E2M1_MAX)).value()


def _online_softmax(
    operands: _Prepared, round_p: Round, walk: _Walk, *, round_sum: Round | None = None
) -> tuple[Tensor, Tensor]:
    """→ output [B, H, N, D] and the base-2 log-sum-exp [B, H, N], both float32."""
    rounding = (round_p, round_sum or (lambda p: p))
    batch, heads, count, _ = operands.q.shape
    block_m = walk.block_m
    rows = max(1, _SCORES // (batch * heads * walk.block_n * block_m)) * block_m
    rows = BLOCK if walk.own_place else rows
    outputs, sums = [], []
    for start in range(0, count, rows):
        means = operands.q_means
        if means is not None:
            means = means[..., start // block_m : (start + rows) // block_m, :]
        q = operands.q[..., start : start + rows, :]
        output, total = _rows_of_output(q, means, operands, rounding, walk.of_rows(start, count))
        outputs.append(output)
        sums.append(total)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _rows_of_output(
    q: Tensor,
    means: Tensor | None,
    operands: _Prepared,
    rounding: tuple[Round, Round],
    walk: _Walk,
) -> tuple[Tensor, Tensor]:
    round_p, round_sum = rounding
    highest = q.new_full((*q.shape[:-1], 1), -math.inf)
    total = torch.zeros_like(highest)
    output = torch.zeros_like(q)
    for start in walk.starts(operands.k.shape[-2]):
        keys = slice(start, start + walk.block_n)
        scores = _product(q, operands.k[..., keys, :].mT)
        if means is not None:
            correction = _product(means, operands.k_exact[..., keys, :].mT)
            scores += correction.repeat_interleave(walk.block_m, -2)[..., : q.shape[-2], :]
        scores = walk.masked(scores, start)
        found = scores.amax(-1, keepdim=True)
        room = torch.where(found - highest <= _LEAP, walk.headroom, 0)
        new_highest = torch.where(found > highest, found + room, highest)
        # Minus infinity where a row has attended to nothing yet, and no number to subtract.
        base = new_highest.clamp(min=_LOWEST)
        rescale = torch.exp2(highest - base)
        p = torch.exp2(scores - base)
        total = total * rescale + round_sum(p).sum(-1, keepdim=True)
        output = output * rescale + _product(round_p(p), operands.v[..., keys, :])
        highest = new_highest
    return output / torch.where(total > 0, total, 1.0), (highest + total.log2()).squeeze(-1)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [B, H, N, K] @ matrix [B, Hk, K, L], each key head serving H/Hk query heads."""
    grouped = rows.reshape(rows.shape[0], matrix.shape[1], -1, rows.shape[3]) @ matrix
    return grouped.reshape(*rows.shape[:3], matrix.shape[3])


def _finish(
    q: Tensor, k: Tensor, scaled: Tensor, result: tuple[Tensor, Tensor], return_lse: bool
) -> Result:
    output, total = result
    if not return_lse:
        return output.to(q.dtype)
    # Subtracting K's mean took q·mean from every score of a row.
    removed = _product(scaled, k.float().mean(-2, keepdim=True).mT).squeeze(-1)
    return output.to(q.dtype), (total + removed) * math.log(2)
