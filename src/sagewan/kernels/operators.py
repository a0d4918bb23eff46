"""Attention modes as torch operators, so that compiled programs call them without a break.

``torch.ops.sagewan.<mode>(q, k, v, scale, block_mask)`` returns the output and
``torch.ops.sagewan.<mode>_with_lse`` the log-sum-exp too. What a call launches does not depend on
the values of its tensors, so it can be captured in a CUDA graph once it has run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagewan.kernels.launch import check

Result = Tensor | tuple[Tensor, Tensor]


def operator(
    mode: str, prepare: Callable[..., Any], attend: Callable[..., Any]
) -> Callable[[Tensor, Tensor, Tensor, float | None, bool, Tensor | None], Result]:
    """Register both operators of a mode from its two halves → the function that calls them.

    It takes q, k, v, the softmax scale or None, whether the log-sum-exp is wanted, and the mask of
    the blocks to attend to or None.
    """

    def output(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, block_mask: Tensor | None = None
    ) -> Any:
        prepared = prepare(q, k, v, scale=scale)
        return attend(prepared, block_mask=block_mask, out=torch.empty_like(q))

    def both(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, block_mask: Tensor | None = None
    ) -> Any:
        prepared = prepare(q, k, v, scale=scale, with_lse=True)
        return attend(prepared, block_mask=block_mask, return_lse=True, out=torch.empty_like(q))

    arguments = "(Tensor q, Tensor k, Tensor v, float? scale, Tensor? block_mask=None)"
    plain = torch.library.custom_op(
        f"sagewan::{mode}", output, mutates_args=(), schema=f"{arguments} -> Tensor"
    )
    plain.register_fake(_fake_output)
    with_lse = torch.library.custom_op(
        f"sagewan::{mode}_with_lse",
        both,
        mutates_args=(),
        schema=f"{arguments} -> (Tensor, Tensor)",
    )
    with_lse.register_fake(_fake_both)

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        return_lse: bool,
        block_mask: Tensor | None,
    ) -> Result:
        # An operator no longer sees whether a gradient is wanted.
        check(q, k, v)
        result: Result = (with_lse if return_lse else plain)(q, k, v, scale, block_mask)
        return result

    return call


def _fake_output(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


def _fake_both(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What the operators return: an output like q in memory, and the log-sum-exp [B, H, N]."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
