"""The form in which the attention kernels take Q, K and V: a contract between two halves.

``prepare_…`` of each mode makes it from 16-bit tensors and ``attend`` multiplies it. Whoever has Q,
K and V at hand anyway, such as a kernel that has just normalised and rotated them, may write this
form itself and spare the pass over memory.

Everything is contiguous unless said otherwise. Lengths N and M are padded to N' and M', multiples
of ``PADDING``, the head size D to D', its :func:`sagewan.kernels.launch.block_of`; with zeros.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

# Kernels load whole blocks of so many rows at most.
PADDING = 128

RowsT = TypeVar("RowsT")
ValuesT = TypeVar("ValuesT")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Q or K as INT8: row n is ``data[n] · scale[n]``.

    data [B, H, N', D'] int8 and scale [B, H, N'] float32; ``dots`` [B, max(H, Hk), N'] float32,
    what each row gives with the other tensor's mean, if wanted. Q's scale holds softmax's scale and
    log₂e; its dots, for the log-sum-exp, softmax's scale. K's dots are in powers of two and are
    added to its scores. ``rows_per_scale`` rows from a multiple of it on have the same scale: as
    many as a kernel's block of rows, and as the keys of its step, or more; Q's are at least
    :func:`sagewan.kernels.query_key.lowest_scale` of the keys.
    """

    data: Tensor
    scale: Tensor
    rows_per_scale: int
    dots: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """V as FP8, transposed: channel d of V is ``data[d] · scale[d]``.

    data [B, Hk, D', M'] float8_e4m3fn with its keys in the order of
    :func:`sagewan.kernels.prepare.e4m3_columns`; scale [B, Hk, D'] float32.
    """

    data: Tensor
    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class Fp4Rows:
    """Q or K as NVFP4: 16 channels of row n are ``data · scales[n] · scale[n // 128]``.

    data [B, H, N', D'/2] uint8, two e2m1 to a byte, the first in its low half; scales
    [B, H, N', D'/16] uint8, the bytes of e4m3; scale [B, H, N'/128] float32, powers of two. D' is
    at least 64. Q holds softmax's scale and log₂e; ``dots`` as in :class:`Rows`, for the
    log-sum-exp.
    """

    data: Tensor
    scales: Tensor
    scale: Tensor
    dots: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Fp4Columns:
    """V as NVFP4, transposed: 16 keys of channel d are ``data[d] · scales[:, d] · scale[d]``.

    data [B, Hk, D', M'/2] uint8 and scales [B, Hk, M'/128, D', 8] uint8 as in :class:`Fp4Rows`, the
    scales of 128 keys together, so that they are read in one piece; scale [B, Hk, D'] float32,
    powers of two.
    """

    data: Tensor
    scales: Tensor
    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """What was taken from Q: the mean of each 128 rows, whose scores are added again.

    means [B, H, N'/128, D'] float32 hold softmax's scale and log₂e; k is K as it came,
    [B, Hk, M, D] in 16 bit, any strides, and k_mean [B, Hk, D'] float32 what was taken from it.
    """

    means: Tensor
    k: Tensor
    k_mean: Tensor


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[RowsT, ValuesT]):
    """Q, K and V as an attention kernel multiplies them.

    ``q`` and ``k`` are :class:`Rows`; ``v`` is the tensor itself, [B, Hk, M, D] of any strides,
    where P·V multiplies in 16 bit, and else :class:`Columns`. In FP4 they are :class:`Fp4Rows` and
    :class:`Fp4Columns`. ``queries`` and ``keys`` are N and M,
    ``head_dim`` is D, all without padding; ``dtype`` is the output's.
    """

    q: RowsT
    k: RowsT
    v: ValuesT
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class PreparedFp4(Prepared[Fp4Rows, Fp4Columns]):
    """Q, K and V in NVFP4, and what was taken from Q."""

    smoothing: Smoothing
