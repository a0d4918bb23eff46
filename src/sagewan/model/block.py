"""The forward pass of one Wan block, with the weights of diffusers' WanTransformerBlock.

The arithmetic is diffusers' own (0.42, models/transformers/transformer_wan.py), rounding by
rounding, but in chunks of tokens, so that no float32 copy of the whole sequence ever exists, and
in place. What is alive at once is the hidden state, Q, K and V: attention goes through the heads
in groups and leaves each group's result where its Q was. One chunk, all heads: the same bits.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sagewan.model.attention import Attention
from sagewan.model.times import Modulation
from sagewan.plan.models import TEXT_TOKENS

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Block:
    """The forward pass of block ``layer`` of a transformer, in the chunks of the turn."""

    block: Any
    attention: Attention
    layer: int

    def __call__(self, hidden: Tensor, text: Tensor, times: Modulation, rotary: Rotary) -> Tensor:
        """hidden [B, N, W], overwritten and given back; text [B, 512 + I, W], of which the first I
        tokens are a picture's; ``times`` the time's six vectors, before the block's own table is
        added; the rotary pair float32 [1, N, 1, D]."""
        self.attention.turn.check()
        table = self.block.scale_shift_table.unsqueeze(0)
        own = Modulation(table + times.vectors.float(), times.bounds)
        self._attend_to_self(hidden, own, rotary)
        self._attend_to_text(hidden, text)
        self._feed_forward(hidden, own)
        return hidden

    def _attend_to_self(self, hidden: Tensor, times: Modulation, rotary: Rotary) -> None:
        block, attn = self.block, self.block.attn1
        cos, sin = rotary
        q, k, v = (hidden.new_empty(by_heads(hidden, attn)) for _ in range(3))
        for start, stop in self._chunks(hidden):
            shift, scale, *_ = times.at(start, stop)
            x = modulated(block.norm1, hidden[:, start:stop], shift, scale)
            here = cos[:, start:stop], sin[:, start:stop]
            rotate(heads_of(attn.norm_q(attn.to_q(x)), attn), *here, out=q[:, start:stop])
            rotate(heads_of(attn.norm_k(attn.to_k(x)), attn), *here, out=k[:, start:stop])
            v[:, start:stop] = heads_of(attn.to_v(x), attn)
            del x
        out = attend_in_groups(self.attention, self.layer, q, k, v)
        del q, k, v
        for start, stop in self._chunks(hidden):
            gate = times.at(start, stop)[2]
            y = _projected(attn, out[:, start:stop].flatten(2).to(hidden.dtype))
            _add_gated(hidden[:, start:stop], y, gate)

    def _attend_to_text(self, hidden: Tensor, text: Tensor) -> None:
        """Each token's attention is its own affair, so tokens come in chunks here too. Torch's
        SDPA in the model's dtype: it is under 2 % of the time."""
        block, attn = self.block, self.block.attn2
        known = self.attention.keys_of_text(self.layer, lambda: text_keys(attn, text))
        for start, stop in self._chunks(hidden):
            here = hidden[:, start:stop]
            x = block.norm2(here.float()).type_as(hidden)
            q = heads_of(attn.norm_q(attn.to_q(x)), attn)
            here.copy_(here + _projected(attn, attend_to(q, known)))

    def _feed_forward(self, hidden: Tensor, times: Modulation) -> None:
        block = self.block
        for start, stop in self._chunks(hidden):
            *_, shift, scale, gate = times.at(start, stop)
            x = modulated(block.norm3, hidden[:, start:stop], shift, scale)
            _add_gated(hidden[:, start:stop], block.ffn(x), gate)

    def _chunks(self, hidden: Tensor) -> list[tuple[int, int]]:
        return chunks(hidden.shape[1], self.attention.turn.chunk)


def attend_in_groups(attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, N, H, D] → [B, N, H, D]; q is overwritten where heads come in groups."""
    heads = attention.turn.heads
    count = q.shape[2]
    if heads is None or heads >= count:
        heads = count
    for first in range(0, count, heads):
        group = [x[:, :, first : first + heads].transpose(1, 2) for x in (q, k, v)]
        out = attention.attend(group[0], group[1], group[2], layer)
        if heads == count:
            return out.transpose(1, 2)
        q[:, :, first : first + heads] = out.transpose(1, 2)
    return q


def chunks(tokens: int, size: int | None) -> list[tuple[int, int]]:
    """Chunks of at most ``size`` tokens, as even as can be; None is one chunk.

    >>> chunks(10, 4)
    [(0, 4), (4, 7), (7, 10)]
    """
    count = 1 if size is None else -(-tokens // size)
    each, more = divmod(tokens, count)
    starts = [i * each + min(i, more) for i in range(count + 1)]
    return list(itertools.pairwise(starts))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rotary positions: x [B, N, H, D] → the same, each pair of features (2i, 2i+1) turned.

    ``cos`` and ``sin`` are float32 [1, N, 1, D] with every angle written twice; the product is
    rounded once, to x's dtype. Written to ``out`` if there is one.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = x.new_empty(x.shape) if out is None else out
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def modulated(norm: Callable[[Tensor], Tensor], x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift, computed in float32, in x's dtype."""
    return norm(x.float()).mul_(1 + scale).add_(shift).type_as(x)


def _add_gated(hidden: Tensor, y: Tensor, gate: Tensor) -> None:
    """hidden += y·gate, summed in float32, in place."""
    hidden.copy_((y * gate).add_(hidden))


def text_keys(attn: Any, text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """K and V of the text and, in Wan 2.1, of the picture before it."""
    picture = None
    if attn.add_k_proj is not None:
        split = text.shape[1] - TEXT_TOKENS
        picture, text = text[:, :split], text[:, split:]
    known = [(heads_of(attn.norm_k(attn.to_k(text)), attn), heads_of(attn.to_v(text), attn))]
    if picture is not None:
        k = heads_of(attn.norm_added_k(attn.add_k_proj(picture)), attn)
        known.append((k, heads_of(attn.add_v_proj(picture), attn)))
    return known


def by_heads(hidden: Tensor, attn: Any) -> tuple[int, int, int, int]:
    """The shape of Q of a hidden state [B, N, W]."""
    batch, tokens, width = hidden.shape
    return batch, tokens, attn.heads, width // attn.heads


def heads_of(x: Tensor, attn: Any) -> Tensor:
    """[B, N, H·D] → [B, N, H, D]."""
    split: Tensor = x.unflatten(2, (attn.heads, -1))
    return split


def attend_to(q: Tensor, known: list[tuple[Tensor, Tensor]]) -> Tensor:
    """q [B, N, H, D] and the keys and values of text and picture → [B, N, H·D]."""
    # Two attentions, summed: the picture's tokens don't compete with the text's.
    y = _attend(q, *known[0])
    for keys in known[1:]:
        y = y + _attend(q, *keys)
    return y


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, N, H, D], k and v [B, M, H, D] → [B, N, H·D], by torch's SDPA."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def _projected(attn: Any, out: Tensor) -> Tensor:
    projected: Tensor = attn.to_out[1](attn.to_out[0](out))
    return projected
