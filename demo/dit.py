"""A cheaper forward of WanTransformer3DModel, exactly equal to it, for training and scoring.

Two things are shared that diffusers computes over and over:
- Text: WanPipeline pads a prompt with zero embeddings to 512 tokens and attends to all of them.
  Identical keys count as one key whose score is raised by log(how many), so `TEXT_LENGTH` tokens
  with a bias on the zero ones do the same.
- Time: with `expand_timesteps` every token has its own time, but only two values occur: that of
  the first latent frame (0 when it is given as an image) and that of all others.
tests/demo proves equality with the model's own forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

TEXT_LENGTH = 32  # the longest caption has 26 tokens
FULL_LENGTH = 512  # what WanPipeline pads to


def embed_text(encoder: UMT5EncoderModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids int64 [B, TEXT_LENGTH], 0 where padded, at least one so.

    → embeddings [B, L, D], zero where padded, and the keys' bias [B, 1, 1, L].
    """
    real = ids != 0
    hidden = encoder(ids, real.long()).last_hidden_state * real[..., None]
    count = real.sum(1, keepdim=True)
    spare = (FULL_LENGTH - count) / (ids.shape[1] - count)
    bias = torch.where(real, 0.0, spare.log())
    return hidden, bias[:, None, None]


def _per_token(pair: Tensor, first: int, tokens: int) -> Tensor:
    """[B, 2, D] (first latent frame, the others) → [B, tokens, D]."""
    return torch.cat(
        [pair[:, :1].expand(-1, first, -1), pair[:, 1:].expand(-1, tokens - first, -1)], 1
    )


def _modulate(x: Tensor, norm: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
    return norm(x.float()) * (1 + scale) + shift


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs: x [B, N, H, D]; cos, sin [1, N, 1, D/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _heads(attention: nn.Module, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    split = (attention.heads, -1)
    query = attention.norm_q(attention.to_q(x)).unflatten(2, split)
    key = attention.norm_k(attention.to_k(context)).unflatten(2, split)
    return query, key, attention.to_v(context).unflatten(2, split)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N, H, D] each → [B, N, H*D] in value's dtype."""
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    mask = None if bias is None else bias.to(value.dtype).expand(-1, q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def block_forward(
    block: nn.Module,
    x: Tensor,
    text: tuple[Tensor, Tensor],
    time: Tensor,
    rotary: tuple[Tensor, Tensor],
    first: int,
) -> Tensor:
    """One WanTransformerBlock: x [B, N, D], time [B, 2, 6, D], first = tokens of a frame."""
    table = block.scale_shift_table[None] + time.float()
    shift, scale, gate, shift2, scale2, gate2 = (
        _per_token(part.squeeze(2), first, x.shape[1]) for part in table.chunk(6, 2)
    )
    y = _modulate(x, block.norm1, scale, shift)
    query, key, value = _heads(block.attn1, y, y)
    y = _attend(_rotate(query, *rotary), _rotate(key, *rotary), value, None)
    x = x + block.attn1.to_out[0](y) * gate

    embeddings, bias = text
    query, key, value = _heads(block.attn2, block.norm2(x.float()), embeddings)
    x = x + block.attn2.to_out[0](_attend(query, key, value, bias))

    y = _modulate(x, block.norm3, scale2, shift2)
    return x + block.ffn(y) * gate2


def forward(
    model: WanTransformer3DModel,
    latents: Tensor,
    times: Tensor,
    text: tuple[Tensor, Tensor],
    block_step: object = block_forward,
) -> Tensor:
    """latents [B, C, T, H, W]; times [B, 2] in 0..1000 (first latent frame, others); text from
    `embed_text` → velocity [B, C, T, H, W] float32. `block_step` may be a compiled block_forward.
    """
    batch, _, frames, height, width = latents.shape
    first = height // 2 * (width // 2)
    cos, sin = model.rope(latents)
    rotary = (cos[..., 0::2], sin[..., 1::2])
    x = model.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous().float()

    embedder = model.condition_embedder
    step = embedder.time_embedder(embedder.timesteps_proj(times.flatten()).float())
    time = embedder.time_proj(F.silu(step)).unflatten(1, (6, -1)).unflatten(0, (batch, 2))
    context = (embedder.text_embedder(text[0]), text[1])
    for block in model.blocks:
        x = block_step(block, x, context, time, rotary, first)

    table = model.scale_shift_table[None] + step.unflatten(0, (batch, 2))[:, :, None]
    shift, scale = (_per_token(p.squeeze(2), first, x.shape[1]) for p in table.chunk(2, 2))
    out = model.proj_out(_modulate(x, model.norm_out, scale, shift)).float()
    out = out.view(batch, frames, height // 2, width // 2, 2, 2, -1)
    return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """The noise level after the scheduler's shift: both in 0..1."""
    return shift * uniform / (1 + (shift - 1) * uniform)
