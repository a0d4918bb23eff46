"""The forward pass of diffusers' WanTransformer3DModel, with its weights and in its arithmetic
(diffusers 0.42, models/transformers/transformer_wan.py), in less memory.

Against diffusers' own: times are computed once for all tokens that share one, and the last norm
and projection go by chunks of tokens, as the blocks do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sagewan.model.attention import Attention
from sagewan.model.block import Block, chunks, modulated
from sagewan.model.times import Modulation, Times


def install(
    transformer: Any,
    attention: Attention,
    forward: Callable[[Any, Attention, int], Callable[..., Tensor]] = Block,
) -> None:
    """Let a WanTransformer3DModel and its blocks run by our forward passes, with this attention;
    installed again, by the new one. ``forward`` makes that of each block, given its number."""
    for layer, block in enumerate(transformer.blocks):
        block.forward = forward(block, attention, layer)
    transformer.forward = Transformer(transformer, attention)


@dataclass(frozen=True)
class Transformer:
    """The forward pass of a whole transformer."""

    model: Any
    attention: Attention

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Latents [B, C, F, H, W], times [1] or, for TI2V, [1, tokens], text [B, 512, D] and CLIP's
        tokens [P, 257, D], where B is 1 → (the prediction [B, C', F, H, W],)."""
        if return_dict:
            raise ValueError("return_dict is not taken: the prediction comes in a tuple")
        model = self.model
        rotary = model.rope(hidden_states)
        hidden = model.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        times = Times.of(timestep, hidden.shape[1])
        embedded, vectors, text = self._conditions(
            times, encoder_hidden_states, encoder_hidden_states_image
        )
        times_of_blocks = Modulation(vectors, times.bounds)
        blocks = partial(self._blocks, text=text, times=times_of_blocks, rotary=rotary)
        turn = self.attention.turn
        hidden = turn.residuals.through(turn.text, hidden, blocks)
        table = model.scale_shift_table.unsqueeze(0) + embedded.unsqueeze(2)
        out = self._projected(hidden, Modulation(table, times.bounds))
        return (self._unpatched(out, hidden_states.shape),)

    def _blocks(
        self, hidden: Tensor, text: Tensor, times: Modulation, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """All blocks, [B, N, W] → the same, in the order of the turn's tiles. In it frames stay
        whole runs of tokens, and so do those that share a time."""
        tiles = self.attention.turn.tiles
        if tiles:
            # In place: whoever calls this holds the hidden state, too.
            hidden.copy_(tiles.arranged(hidden))
            rotary = tiles.arranged(rotary[0]), tiles.arranged(rotary[1])
        for block in self.model.blocks:
            hidden = block(hidden, text, times, rotary)
        return tiles.restored(hidden) if tiles else hidden

    def _conditions(
        self, times: Times, text: Tensor, picture: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The time's embedding [B, T, W], its vectors for the blocks [B, T, 6, W], and what is
        attended to: the text behind the picture."""
        embedded, vectors, text, picture = self.model.condition_embedder(
            times.values.flatten(), text, picture, timestep_seq_len=times.values.shape[1]
        )
        if picture is not None:
            text = torch.cat([picture, text], dim=1)
        return embedded, vectors.unflatten(2, (6, -1)), text

    def _projected(self, hidden: Tensor, times: Modulation) -> Tensor:
        """The last norm and projection, [B, N, W] → [B, N, C'·patch]."""
        parts = []
        for start, stop in chunks(hidden.shape[1], self.attention.turn.chunk):
            shift, scale = times.at(start, stop)
            x = modulated(self.model.norm_out, hidden[:, start:stop], shift, scale)
            parts.append(self.model.proj_out(x))
        return torch.cat(parts, dim=1)

    def _unpatched(self, out: Tensor, shape: torch.Size) -> Tensor:
        """Tokens [B, N, C'·f·h·w] → latents [B, C', F, H, W]."""
        patch = self.model.config.patch_size
        counts = [size // step for size, step in zip(shape[2:], patch, strict=True)]
        pieces = out.reshape(len(out), *counts, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        latents: Tensor = pieces.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents
