"""An attention processor for diffusers' own WanTransformer3DModel, in diffusers' own pipelines."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sagewan.model.block import rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


class SelfAttention:
    """Self-attention by ``attend``, which takes and gives [B, H, N, D]; all else as diffusers'
    WanAttnProcessor (0.42), bit for bit."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """hidden_states [B, N, H·D] → [B, N, H·D]; the rotary pair is float32 [1, N, 1, D]."""
        if attention_mask is not None or encoder_hidden_states is not None or rotary_emb is None:
            raise ValueError("Wan's self-attention takes rotary positions, no mask and no text")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(q))
        return attn.to_out[1](projected)  # type: ignore[no-any-return]
