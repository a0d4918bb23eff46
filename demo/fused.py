"""One Triton kernel for what surrounds every convolution of the autoencoder.

`norm_act(x, gamma, past)`: RMS norm over the channels, SiLU, and `past` frames of zeros in front,
for a causal convolution to eat. In plain PyTorch these are about ten passes over the largest
tensors and as long as the convolutions themselves. Rows are pixels, columns channels
(channels_last_3d memory); needs a GPU, or TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # pixels a program


@triton.jit
def _forward(x, gamma, y, rows, per_clip, past_rows, scale, C: tl.constexpr, BLOCK_C: tl.constexpr,
             BLOCK_R: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    value = tl.load(x + row[:, None] * C + column[None, :], inside, other=0.0).to(tl.float32)
    weight = tl.load(gamma + column, column < C, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.maximum(tl.sum(value * value, 1), 1e-24))
    act = value / length[:, None] * weight[None, :] * scale
    act = act * tl.sigmoid(act)
    place = row + (row // per_clip + 1) * past_rows
    tl.store(y + place[:, None] * C + column[None, :], act.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(x, gamma, dy, dx, dgamma, rows, per_clip, past_rows, scale, C: tl.constexpr,
              BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    value = tl.load(x + row[:, None] * C + column[None, :], inside, other=0.0).to(tl.float32)
    weight = tl.load(gamma + column, column < C, other=0.0).to(tl.float32) * scale
    place = row + (row // per_clip + 1) * past_rows
    grad = tl.load(dy + place[:, None] * C + column[None, :], inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.maximum(tl.sum(value * value, 1), 1e-24))
    unit = value / length[:, None]
    act = unit * weight[None, :]
    gate = tl.sigmoid(act)
    grad = grad * gate * (1 + act * (1 - gate))
    part = tl.sum(grad * unit, 0) * scale
    tl.store(dgamma + tl.program_id(0) * C + column, part, column < C)
    grad = grad * weight[None, :]
    grad = (grad - unit * tl.sum(grad * unit, 1)[:, None]) / length[:, None]
    tl.store(dx + row[:, None] * C + column[None, :], grad.to(dx.dtype.element_ty), inside)


def _sizes(x: Tensor, past: int) -> tuple[int, int, int, int, int]:
    """rows, rows a clip, rows of zeros a clip, C, C rounded up to a power of two."""
    batch, channels, frames, height, width = x.shape
    area = height * width
    return (
        batch * frames * area,
        frames * area,
        past * area,
        channels,
        triton.next_power_of_2(channels),
    )


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, past: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        rows, per_clip, past_rows, channels, block = _sizes(x, past)
        batch, _, frames, height, width = x.shape
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        y = torch.empty(
            (batch, frames + past, height, width, channels), dtype=kind, device=x.device
        )
        y[:, :past] = 0
        _forward[(triton.cdiv(rows, ROWS),)](
            x, gamma, y, rows, per_clip, past_rows, channels**0.5, channels, block, ROWS
        )
        ctx.save_for_backward(x, gamma)
        ctx.past = past
        return y.permute(0, 4, 1, 2, 3)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gamma = ctx.saved_tensors
        rows, per_clip, past_rows, channels, block = _sizes(x, ctx.past)
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        dx = torch.empty_like(x)
        programs = triton.cdiv(rows, ROWS)
        dgamma = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            x,
            gamma,
            dy,
            dx,
            dgamma,
            rows,
            per_clip,
            past_rows,
            channels**0.5,
            channels,
            block,
            ROWS,
        )
        return dx, dgamma.sum(0).view_as(gamma).to(gamma.dtype), None


def norm_act(x: Tensor, gamma: Tensor, past: int) -> Tensor:
    """x [B, C, T, H, W], gamma [C, 1, 1, 1] → [B, C, past + T, H, W]."""
    return _NormAct.apply(x, gamma, past)
