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

from functools import cache

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

TEXT_LENGTH = 48  # the longest caption has some 40 tokens
FULL_LENGTH = 512  # what WanPipeline pads to


@cache
def _buckets(attention: nn.Module, tokens: int, device: torch.device) -> Tensor:
    """int64 [tokens, tokens]: the bucket of every distance, which no weight changes."""
    place = torch.arange(tokens)
    bucket = attention._relative_position_bucket  # noqa: SLF001 (transformers has no public one)
    return bucket(place[None] - place[:, None]).to(device)


def _encode_text(encoder: UMT5EncoderModel, ids: Tensor, real: Tensor) -> Tensor:
    """The encoder's last hidden state, without the questions that transformers asks the GPU."""
    x = encoder.shared(ids)
    hidden = torch.where(real, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    for block in encoder.encoder.block:
        attention, normed = block.layer[0].SelfAttention, block.layer[0].layer_norm(x)
        split = (attention.n_heads, -1)
        q, k, v = (
            project(normed).unflatten(2, split).transpose(1, 2)
            for project in (attention.q, attention.k, attention.v)
        )
        near = attention.relative_attention_bias(_buckets(attention, ids.shape[1], ids.device))
        bias = (near.permute(2, 0, 1)[None] + hidden).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = x + attention.o(out.transpose(1, 2).flatten(2))
        feed, normed = block.layer[1].DenseReluDense, block.layer[1].layer_norm(x)
        x = x + feed.wo(F.gelu(feed.wi_0(normed), approximate="tanh") * feed.wi_1(normed))
    return encoder.encoder.final_layer_norm(x)


def embed_text(encoder: UMT5EncoderModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids int64 [B, TEXT_LENGTH], 0 where padded, at least one so.

    → embeddings [B, L, D], zero where padded, and the keys' bias [B, 1, 1, L].
    """
    real = ids != 0
    hidden = _encode_text(encoder, ids, real) * real[..., None]
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


def _patches(convolution: nn.Conv3d, latents: Tensor) -> Tensor:
    """[B, C, T, H, W] → [B, T * H/2 * W/2, D]: the convolution by patches as one product."""
    cells = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # B, C, T, H/2, 2, W/2, 2
    cells = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    return F.linear(cells, convolution.weight.flatten(1), convolution.bias)


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
    x = _patches(model.patch_embedding, latents).float()
    if torch.is_grad_enabled() and not x.requires_grad:
        x.requires_grad_()  # so that the first block is compiled as the others are

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


def compiled_block(device: torch.device) -> object:
    """`block_forward`, compiled for each shape it meets on a GPU."""
    if device.type != "cuda":
        return block_forward
    return torch.compile(block_forward, fullgraph=True, dynamic=False)


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """The noise level after the scheduler's shift: both in 0..1."""
    return shift * uniform / (1 + (shift - 1) * uniform)
