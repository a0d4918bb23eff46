"""Attention processors for diffusers' WanTransformer3DModel.

Self-attention goes through the launcher, with the choice that the plan made for this step and
layer. Cross-attention (512 text tokens, and in Wan 2.1 the picture's 257) is torch's SDPA in the
model's dtype: it is under 2 % of the time. With the mode ``sdpa`` the result equals, bit for bit,
that of diffusers' own processor (diffusers 0.42, models/transformers/transformer_wan.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sagewan.attention.launch import Launcher
from sagewan.plan.attention import AttentionPlan
from sagewan.plan.models import TEXT_TOKENS

Rotary = tuple[Tensor, Tensor]


@dataclass
class Turn:
    """Whose turn it is: the plan in force, the step from 0, and ``check``, which is called once
    a block and raises when the user has cancelled. Shared by all layers of a run's experts."""

    plan: AttentionPlan
    steps: int
    check: Callable[[], None]
    step: int = 0


class Attention:
    """The self-attention of a run's transformers: one launcher, and the turn now under way."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._turn: Turn | None = None

    @contextmanager
    def during(self, turn: Turn) -> Iterator[Turn]:
        """Attend by this plan within the block; the caller counts ``turn.step`` on."""
        self._turn = turn
        try:
            yield turn
        finally:
            self._turn = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q, k, v [B, H, N, D] → [B, H, N, D], in the implementation planned for this layer."""
        turn = self._turn
        if turn is None:
            raise RuntimeError("a transformer was called outside Attention.during")
        turn.check()
        return self._launcher.attend(q, k, v, turn.plan.choice(turn.step, turn.steps, layer))

    def whole(self) -> AbstractContextManager[None]:
        """A block whose calls are counted only if no implementation fails in it."""
        return self._launcher.whole()

    def install(self, transformer: Any) -> None:
        """Replace both processors of every block of a WanTransformer3DModel."""
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(SelfAttention(self, layer))
            block.attn2.set_processor(CrossAttention())


class SelfAttention:
    """The processor of one layer's self-attention. ``attn`` is diffusers' WanAttention."""

    def __init__(self, attention: Attention, layer: int) -> None:
        self._attention = attention
        self._layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, N, H·D] → [B, N, H·D]; the rotary pair is float32 [1, N, 1, D]."""
        _reject(attention_mask)
        if encoder_hidden_states is not None or rotary_emb is None:
            raise ValueError("self-attention takes rotary positions and no encoder states")
        q = _heads(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        k = _heads(attn.norm_k(attn.to_k(hidden_states)), attn.heads)
        v = _heads(attn.to_v(hidden_states), attn.heads)
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self._attention.attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self._layer
        )
        return _project(attn, out.transpose(1, 2).flatten(2).type_as(q))


class CrossAttention:
    """The processor of one layer's attention to the text and, in Wan 2.1, to the picture."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, N, H·D] to encoder_hidden_states [B, 512 + I, H·D], of which the
        first I tokens are the picture's → [B, N, H·D]."""
        _reject(attention_mask)
        if encoder_hidden_states is None or rotary_emb is not None:
            raise ValueError("cross-attention takes encoder states and no rotary positions")
        text, picture = encoder_hidden_states, None
        if attn.add_k_proj is not None:
            split = encoder_hidden_states.shape[1] - TEXT_TOKENS
            picture, text = encoder_hidden_states[:, :split], encoder_hidden_states[:, split:]
        q = _heads(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        k = _heads(attn.norm_k(attn.to_k(text)), attn.heads)
        out = _attend(q, k, _heads(attn.to_v(text), attn.heads))
        if picture is not None:
            # Two attentions, summed: the picture's tokens don't compete with the text's.
            k = _heads(attn.norm_added_k(attn.add_k_proj(picture)), attn.heads)
            out = out + _attend(q, k, _heads(attn.add_v_proj(picture), attn.heads))
        return _project(attn, out)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, N, H, D] → the same, each pair of features (2i, 2i+1) turned.

    ``cos`` and ``sin`` are float32 [1, N, 1, D] with every angle written twice; the product is
    rounded once, to x's dtype.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = x.new_empty(x.shape)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] → [B, N, H, D]."""
    split: Tensor = x.unflatten(2, (heads, -1))
    return split


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, N, H, D], k and v [B, M, H, D] → [B, N, H·D], by torch's SDPA."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def _project(attn: Any, out: Tensor) -> Tensor:
    projected: Tensor = attn.to_out[1](attn.to_out[0](out))
    return projected


def _reject(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("Wan's attention takes no mask")
