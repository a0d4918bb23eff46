"""A module's weights as one list of tensors, whatever its layers are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# What cuBLAS, vector loads and fp8 matrix products all are content with, in bytes.
ALIGNMENT = 256


def tensors_of(module: Any) -> list[Tensor]:
    """Every parameter and buffer, each once: what moves when a module moves.

    The objects themselves, so that pointing their ``data`` elsewhere moves the module, whatever
    Linear it is made of, and whatever else refers to the same parameter.
    """
    found = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return list(found.values())


def nbytes_of(module: Any) -> int:
    """Bytes of all weights of a module."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def packed_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of one buffer that holds them all, each at an aligned place."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def views_in(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors of these shapes and dtypes, one after the other in a uint8 buffer."""
    # Buffers outlive a run, so they must not be tensors of its inference mode.
    with torch.inference_mode(mode=False):
        views, start = [], 0
        for tensor in like:
            flat = buffer[start : start + tensor.nbytes]
            views.append(flat.view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor.nbytes)
        return views


def point(tensors: Sequence[Tensor], data: Sequence[Tensor]) -> None:
    """Let each tensor hold this data from now on."""
    for tensor, value in zip(tensors, data, strict=True):
        tensor.data = value


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
