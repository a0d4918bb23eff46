"""A row's function in two halves, as the kernels' modules have them."""

from typing import Any

from torch import Tensor


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend((q, k, v), out=q.clone())


def attend(prepared: Any, *, block_mask: Tensor | None = None, out: Tensor) -> Tensor:
    """The mean of V, where the mask is true."""
    if prepared is None:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")
    value = prepared[2] if block_mask is None else prepared[2][:, :, :1]
    return out.copy_(value.mean(2, keepdim=True).expand_as(out))
