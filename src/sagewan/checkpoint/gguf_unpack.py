"""GGUF's packed types → float32, by plain torch operations on the packed bytes, so on the GPU too.

A row is a run of blocks; a block holds its numbers in a few bits each and one or two float16
factors. The blocks of 256 of the K types have eight or sixteen groups whose own factors take 6 or
8 bits. Source: ggml-quants.h; held equal, bit for bit, to the ``gguf`` package, which unpacks the
types that are not written here.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sagewan.checkpoint.gguf_header import TYPES

_BLOCKS = {name: (numbers, size) for name, numbers, size in TYPES.values()}


def unpack_gguf(data: Tensor, kind: str) -> Tensor:
    """data uint8 [N, bytes of a row] of the type ``kind``, such as ``Q8_0`` → float32 [N, K]."""
    _, size = _BLOCKS[kind]
    rows = data.shape[0]
    blocks = data.reshape(-1, size)
    unpack = _UNPACK.get(kind)
    return (unpack(blocks) if unpack else _by_package(blocks, kind)).view(rows, -1)


def _by_package(blocks: Tensor, kind: str) -> Tensor:
    import gguf

    found = gguf.quants.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(found).to(blocks.device)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of each block → float32 [B, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] → [..., 2n]: all low halves, then all high ones."""
    return torch.cat([packed & 0xF, packed >> 4], dim=-1)


def _bits(packed: Tensor, count: int, width: int) -> Tensor:
    """uint8 [B, n] → [B, count, n]: the count lowest fields of ``width`` bits of each byte."""
    shifts = torch.arange(0, count * width, width, device=packed.device, dtype=torch.uint8)
    fields: Tensor = (packed.unsqueeze(1) >> shifts.view(1, count, 1)) & (2**width - 1)
    return fields


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """uint8 [B, 4] → [B, 32], the bits in their order, each as 16 or 0."""
    return _bits(packed, 8, 1).transpose(1, 2).reshape(-1, 32) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * numbers.float() + _half(blocks, 2)


def _group_factors(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K → eight factors and eight offsets of 6 bits, [B, 8] each."""
    first, second, high = packed.split(4, dim=1)
    factors = torch.cat([first & 63, (high & 0xF) | ((first >> 6) << 4)], dim=1)
    offsets = torch.cat([second & 63, (high >> 4) | ((second >> 6) << 4)], dim=1)
    return factors.float(), offsets.float()


def _grouped(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Q4_K and Q5_K: numbers [B, 8, 32] by the group's factor, less its offset."""
    factors, offsets = _group_factors(blocks[:, 4:16])
    factors, offsets = _half(blocks, 0) * factors, _half(blocks, 2) * offsets
    return factors.unsqueeze(2) * numbers.float() - offsets.unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    return _grouped(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return _grouped(blocks, low | (_bits(blocks[:, 16:48], 8, 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 8, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 32), 4, 2).view(-1, 8, 32)
    numbers = (low | (high << 4)).float() - 32
    factors = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return factors.unsqueeze(2) * numbers.view(-1, 16, 16)


_UNPACK: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
