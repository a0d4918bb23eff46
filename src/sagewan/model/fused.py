"""The forward pass of one Wan block in few passes over memory, for a GPU.

The same block as :mod:`sagewan.model.block`, with the same weights, whose steps between the
products are kernels of ours: each residual is added, normalised, modulated and written as the next
product takes it in one pass; Q and K are normalised and rotated in one. What a product would round
to FP8 is not written in 16 bit before it. Chunks of tokens go through all that follows
self-attention at once.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from sagewan.kernels.fp8_linear import quantize_rows
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.hopper_attention import output_scale
from sagewan.kernels.hopper_prepare import Position, prepare_projections
from sagewan.kernels.token_rows import Norm, Residual, add_and_norm, norm_and_rotate
from sagewan.model.attention import Attention
from sagewan.model.block import (
    Rotary,
    attend_in_groups,
    attend_to,
    by_heads,
    chunks,
    heads_of,
    text_keys,
)
from sagewan.model.blocks import Passes
from sagewan.model.linear import QuantLinear
from sagewan.model.matmul import Gate
from sagewan.model.times import Modulation

Operand = Tensor | Fp8Rows


@dataclass(frozen=True)
class FusedBlock:
    """As :class:`sagewan.model.block.Block`, by the kernels of ``passes``."""

    block: Any
    attention: Attention
    layer: int
    passes: Passes

    def __call__(self, hidden: Tensor, text: Tensor, times: Modulation, rotary: Rotary) -> Tensor:
        """As :meth:`sagewan.model.block.Block.__call__`."""
        self.attention.turn.check()
        table = self.block.scale_shift_table.unsqueeze(0)
        own = Modulation(table + times.vectors.float(), times.bounds)
        attended = self._attended(hidden, own, rotary)
        cross = self.block.attn2
        known = self.attention.keys_of_text(self.layer, lambda: text_keys(cross, text))
        gates = _Gates()
        for start, stop in chunks(hidden.shape[1], self.attention.turn.chunk):
            chunk = _Chunk(hidden[:, start:stop], own.runs(start, stop), gates)
            self._after_attention(chunk, _tokens(attended, start, stop), known)
        return hidden

    def _attended(self, hidden: Tensor, times: Modulation, rotary: Rotary) -> Operand:
        """Self-attention of the normalised hidden state, before its last product: [B, N, H, D], or
        [B, N, W] where it is FP8."""
        block, attn = self.block, self.block.attn1
        cos, sin = rotary
        found: list[Tensor] = []
        # Where all heads are attended at once there is room for more than all tokens' inputs, and
        # what the products give is Q, K and V themselves.
        turn = self.attention.turn
        parts = chunks(hidden.shape[1], None if turn.heads is None else turn.chunk)
        if len(parts) > 1:
            found = [hidden.new_empty(by_heads(hidden, attn)) for _ in range(3)]
        for start, stop in parts:
            chunk = _Chunk(hidden[:, start:stop], times.runs(start, stop))
            x = self._normed(chunk, block.norm1, (0, 1), (attn.to_q, attn.to_k, attn.to_v))
            here = cos[:, start:stop], sin[:, start:stop]
            q, k, v = (heads_of(_product(p, x), attn) for p in (attn.to_q, attn.to_k, attn.to_v))
            del x
            if not found:
                return self._attend(q, k, v, here)
            here_q, here_k, here_v = (whole[:, start:stop] for whole in found)
            self._rotate(q, here_q, attn.norm_q, here)
            self._rotate(k, here_k, attn.norm_k, here)
            here_v.copy_(v)
        return attend_in_groups(self.attention, self.layer, *found)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Operand:
        """What the products of all tokens give, each [B, N, H, D] → their attention, as
        :meth:`_attended` gives it; q and k are overwritten."""
        attn = self.block.attn1
        self._rotate(q, q, attn.norm_q, rotary)
        self._rotate(k, k, attn.norm_k, rotary)
        return attend_in_groups(self.attention, self.layer, q, k, v)

    def _rotate(self, x: Tensor, out: Tensor, norm: Any, rotary: Rotary | None) -> None:
        self.passes.run(norm_and_rotate, x, out, norm.weight, norm.eps, rotary)

    def _after_attention(
        self, chunk: "_Chunk", attended: Operand, known: list[tuple[Tensor, Tensor]]
    ) -> None:
        block, cross, ffn = self.block, self.block.attn2, self.block.ffn.net
        if isinstance(attended, Tensor):
            attended = attended.flatten(2).to(chunk.hidden.dtype)
        # What waits to be added is named by nobody, and so gone once it is.
        x = self._normed(
            chunk,
            block.norm2,
            None,
            (cross.to_q,),
            self._added(chunk, block.attn1.to_out[0], attended, 2),
        )
        q = heads_of(_product(cross.to_q, x), cross)
        self._rotate(q, q, cross.norm_q, None)
        through = _gives_gelu(*ffn[::2])
        x = self._normed(
            chunk,
            block.norm3,
            (3, 4),
            (ffn[0].proj,),
            self._added(chunk, cross.to_out[0], attend_to(q, known), None),
            lengths=through,
        )
        inner = ffn[0].proj.gelu_of_fp8(x) if through else _product(ffn[0].proj, x)
        del x, q
        if _takes_fp8(ffn[2]):
            inner = inner if through else self.passes.run(quantize_rows, inner, gelu=True)
            y = self._added(chunk, ffn[2], inner, 5)
        else:
            y = ffn[2](gelu(inner, approximate="tanh")), 5
        for start, stop, vectors in chunk.runs if y else ():
            here = _residual(y, start, stop, vectors)
            self.passes.run(add_and_norm, chunk.hidden[:, start:stop], None, None, here)

    def _added(
        self, chunk: "_Chunk", layer: Any, x: Operand, gate: int | None
    ) -> "_Waiting | None":
        """What the layer makes of x, times a gate, added to the chunk by the product itself where
        there is one that does; what the next pass is to add, where not."""
        if not (isinstance(layer, QuantLinear) and layer.adds):
            return _product(layer, x), gate
        rows = x if isinstance(x, Fp8Rows) else self.passes.run(quantize_rows, x)
        for start, stop, vectors in chunk.runs:
            here = chunk.hidden[:, start:stop]
            layer.add_of_fp8(rows.tokens(start, stop), chunk.gates.of(layer, vectors, gate), here)
        return None

    def _normed(
        self,
        chunk: "_Chunk",
        norm: Any,
        modulation: tuple[int, int] | None,
        takers: tuple[Any, ...],
        residual: "_Waiting | None" = None,
        *,
        lengths: bool = False,
    ) -> Operand:
        """The chunk, to which a residual is added first, normalised and modulated, as the takers
        take it, with the ``lengths`` of its rows in FP8 if they are wanted; ``modulation`` and the
        residual's gate are places among the time's vectors."""
        fp8 = all(map(_takes_fp8, takers))
        hidden = chunk.hidden
        out = (
            Fp8Rows.empty(*hidden.shape, device=hidden.device, norm=lengths)
            if fp8
            else torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        )
        for start, stop, vectors in chunk.runs:
            added = _residual(residual, start, stop, vectors)
            shift, scale = (vectors[:, i] for i in modulation) if modulation else (None, None)
            self.passes.run(
                add_and_norm,
                hidden[:, start:stop],
                Norm(
                    eps=getattr(norm, "eps", None),
                    weight=getattr(norm, "weight", None),
                    bias=getattr(norm, "bias", None),
                    shift=shift,
                    scale=scale,
                ),
                _tokens(out, start, stop),
                added,
            )
        return out


class HopperBlock(FusedBlock):
    """The block whose Q and K become the attention kernel's 8-bit form in one pass, where that
    kernel is the one that attends, to all heads at once; its output is FP8 where the product that
    takes it would make it so."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Operand:
        choice, attn = self.attention.choice(self.layer), self.block.attn1
        if choice.row.name != self.passes.row.prepares or self.attention.turn.heads is not None:
            return super()._attend(q, k, v, rotary)
        for_q, for_k = (
            Position(weight=norm.weight, eps=norm.eps, cos=rotary[0], sin=rotary[1])
            for norm in (attn.norm_q, attn.norm_k)
        )
        prepared = self.passes.run(prepare_projections, q, k, v, for_q, for_k)
        # Nothing reads what the product gave any more.
        if not _takes_fp8(attn.to_out[0]):
            self.attention.attend_prepared(prepared, q.transpose(1, 2), self.layer)
            return q
        rows = Fp8Rows.within(q.flatten(2), output_scale(prepared))
        out = heads_of(rows.data, attn).transpose(1, 2)
        self.attention.attend_prepared(prepared, out, self.layer)
        return rows


class _Gates:
    """The gates of a block's products, of one pass: what chunks make of them is made once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], list[Gate]] = {}

    def of(self, layer: Any, vectors: Tensor, gate: int | None) -> list[Gate]:
        """A layer's, for each video: which of a time's vectors [B, M, W], which live as long as the
        pass; None for 1."""
        place = id(layer), vectors.data_ptr()
        if place not in self._known:
            every = [None] if gate is None else vectors[:, gate]
            self._known[place] = [Gate(values) for values in every]
        return self._known[place]


@dataclass(frozen=True)
class _Chunk:
    """Tokens of the hidden state [B, n, W], and the runs of them that share a time."""

    hidden: Tensor
    runs: list[tuple[int, int, Tensor]]
    gates: _Gates = field(default_factory=_Gates)


# What is still to be added to a chunk, and its gate's place among the time's vectors.
_Waiting = tuple[Tensor, int | None]


def _residual(waiting: _Waiting | None, start: int, stop: int, vectors: Tensor) -> Residual | None:
    if waiting is None:
        return None
    y, gate = waiting
    return Residual(y=y[:, start:stop], gate=None if gate is None else vectors[:, gate])


def _takes_fp8(layer: Any) -> bool:
    return isinstance(layer, QuantLinear) and layer.takes_fp8


def _gives_gelu(first: Any, second: Any) -> bool:
    """Whether what is between a feed-forward's layers is written by the product of the first."""
    layer = first.proj
    return isinstance(layer, QuantLinear) and layer.gives_gelu and _takes_fp8(second)


def _product(layer: Any, x: Operand) -> Tensor:
    out: Tensor = layer.of_fp8(x) if isinstance(x, Fp8Rows) else layer(x)
    return out


def _tokens(x: Operand, start: int, stop: int) -> Operand:
    return x.tokens(start, stop) if isinstance(x, Fp8Rows) else x[:, start:stop]
