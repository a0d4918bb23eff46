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
    added to its scores.
    """

    data: Tensor
    scale: Tensor
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
class Prepared(Generic[RowsT, ValuesT]):
    """Q, K and V as an attention kernel multiplies them.

    ``q`` and ``k`` are :class:`Rows`; ``v`` is the tensor itself, [B, Hk, M, D] of any strides,
    where P·V multiplies in 16 bit, and else :class:`Columns`. ``queries`` and ``keys`` are N and M,
    ``head_dim`` is D, all without padding; ``dtype`` is the output's.
    """

    q: RowsT
    k: RowsT
    v: ValuesT
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
