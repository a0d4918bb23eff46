"""Wan's VAE in pieces of time and space, with the weights of diffusers' AutoencoderKLWan.

Time: the convolutions are causal, and what each saw last is carried from piece to piece, so pieces
are exact. Space: attention, which sees a whole frame, sits at the small end of both halves; all
else is convolutions. So the small end runs whole, and the rest in tiles that bring along as many
of their neighbours' cells as the convolutions reach: tiles are exact too, without seams to blend.
(diffusers 0.42, models/autoencoders/autoencoder_kl_wan.py; its own tiling runs the attention
within each tile, and blends.)
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What each causal convolution saw last, in the order in which they run.
Memory = list[Any]
# Where whole frames of features wait for their tiles.
_HOST = "cpu"


@dataclass(frozen=True)
class Span:
    """Cells from ``start`` to ``stop`` of a side that has ``size``."""

    start: int
    stop: int
    size: int

    def wider(self, reach: int) -> "Span":
        """As many cells more on both sides, as far as the side goes."""
        start, stop = max(0, self.start - reach), min(self.size, self.stop + reach)
        return Span(start, stop, self.size)

    def scaled(self, factor: int) -> "Span":
        """The same span where each cell is so many."""
        return Span(self.start * factor, self.stop * factor, self.size * factor)

    def within(self, other: "Span") -> slice:
        """Where it lies in a tensor that holds the other span."""
        return slice(self.start - other.start, self.stop - other.start)


@dataclass(frozen=True)
class Tile:
    """A rectangle of latent cells."""

    rows: Span
    columns: Span

    def wider(self, reach: int) -> "Tile":
        return Tile(self.rows.wider(reach), self.columns.wider(reach))

    def scaled(self, factor: int) -> "Tile":
        return Tile(self.rows.scaled(factor), self.columns.scaled(factor))

    def cut(self, x: Tensor, held: "Tile") -> Tensor:
        """This tile's part of x [..., H, W], which holds another."""
        return x[..., self.rows.within(held.rows), self.columns.within(held.columns)]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns in the whole picture."""
        rows, columns = self.rows, self.columns
        return slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def tiles(rows: int, columns: int, size: tuple[int, int]) -> list[Tile]:
    """Tiles of at most ``size`` (rows, columns) latent cells, as even as can be."""
    return [
        Tile(row, column) for row in _spans(rows, size[0]) for column in _spans(columns, size[1])
    ]


def _spans(size: int, most: int) -> list[Span]:
    count = -(-size // most)
    edges = [size * i // count for i in range(count + 1)]
    return [Span(a, b, size) for a, b in itertools.pairwise(edges)]


def decode_pieces(latents: Tensor, vae: Any, at_once: int = 1) -> Iterator[Tensor]:
    """Latents [1, C, F, H, W] → float32 pieces [1, 3, f, H·s, W·s] in their order; together, and
    clamped to −1 … 1, they are ``vae.decode``'s result. The first latent frame gives one frame,
    each later one four. A call of the decoder takes the first latent frame, or ``at_once`` of the
    later ones."""
    hidden = vae.post_quant_conv(latents)
    memory: Memory = [None] * _convolutions(vae.decoder)
    starts = (0, *range(1, hidden.shape[2], at_once))
    for start, stop in zip(starts, (*starts[1:], hidden.shape[2]), strict=True):
        piece = vae.decoder(
            hidden[:, :, start:stop], feat_cache=memory, feat_idx=[0], first_chunk=start == 0
        )
        yield _unpatched(piece, vae)


def decode_tiles(
    latents: Tensor, vae: Any, size: tuple[int, int]
) -> Iterator[tuple[tuple[slice, slice], int, Tensor]]:
    """As :func:`decode_pieces`, but in tiles of ``size`` (rows, columns) latent cells, all of time
    tile by tile: ((rows, columns) in pixels, the first frame's number, the piece)."""
    decoder = vae.decoder
    before = list(_small_end(vae.post_quant_conv(latents), decoder))
    reaches = _reaches(decoder)
    scale = vae.config.scale_factor_spatial
    for tile in tiles(latents.shape[3], latents.shape[4], size):
        held = tile.wider(reaches[0])
        memory: Memory = [None] * _convolutions(decoder)
        done = 0
        for index, features in enumerate(before):
            x = features[..., held.slices[0], held.slices[1]].to(latents.device)
            piece = _unpatched(
                _large_end(x, decoder, (tile, held, reaches), memory, first=index == 0), vae
            )
            yield tile.scaled(scale).slices, done, piece
            done += piece.shape[2]


def _small_end(hidden: Tensor, decoder: Any) -> Iterator[Tensor]:
    """What of the decoder sees whole frames, latent frame by latent frame; kept on the host."""
    memory: Memory = [None] * _convolutions(decoder)
    for index in range(hidden.shape[2]):
        places = [0]
        x = _causal(decoder.conv_in, hidden[:, :, index : index + 1], memory, places)
        x = decoder.mid_block(x, feat_cache=memory, feat_idx=places)
        yield x.to(_HOST)


def _large_end(
    x: Tensor,
    decoder: Any,
    region: tuple[Tile, Tile, Sequence[int]],
    memory: Memory,
    *,
    first: bool,
) -> Tensor:
    """The rest of it, on a tile: after each block, the cells no one needs any more are cut off."""
    tile, held, reaches = region
    places = [0]
    for block, reach in zip(decoder.up_blocks, (*reaches[1:], 0), strict=True):
        before = x.shape[-1]
        x = block(x, feat_cache=memory, feat_idx=places, first_chunk=first)
        factor = x.shape[-1] // before
        tile, held = tile.scaled(factor), held.scaled(factor)
        last = block is decoder.up_blocks[-1]
        needed = held if last else tile.wider(reach)
        x, held = needed.cut(x, held), needed
    x = decoder.nonlinearity(decoder.norm_out(x))
    x = _causal(decoder.conv_out, x, memory, places)
    return tile.cut(x, held)


def _reaches(decoder: Any) -> list[int]:
    """How many cells of its own input each up block's result needs beyond a tile's edge."""
    reach = 1  # the last convolution
    found: list[int] = []
    for block in reversed(decoder.up_blocks):
        upsampler = getattr(block, "upsampler", None) or getattr(block, "upsamplers", None)
        if upsampler is not None:
            reach = -(-(reach + 1) // 2)  # its convolution comes after the doubling
        reach += 2 * len(block.resnets)
        found.insert(0, reach)
    return found


def with_channels_last(vae: Any) -> Any:
    """The VAE with its convolutions' weights laid out so that the features of a cell lie side by
    side: what they give is laid out so too, and everything between them keeps it."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
    return vae


def encode(
    frames: Callable[[int, int], Tensor], count: int, vae: Any, size: tuple[int, int] | None
) -> Tensor:
    """The mode of the VAE's latents [1, C, F, H, W] of a video of ``count`` frames; what
    ``frames(start, stop)`` gives is float32 [1, 3, stop - start, H·s, W·s] in −1 … 1, asked for in
    order once for each tile of ``size`` latent cells, or once where that is None."""
    pieces = [(0, 1), *((i, min(i + 4, count)) for i in range(1, count, 4))]
    encoder = vae.encoder
    if size is None:
        memory: Memory = [None] * _convolutions(encoder)
        out = [
            encoder(_patched(frames(*piece), vae), feat_cache=memory, feat_idx=[0])
            for piece in pieces
        ]
        return _mode(torch.cat(out, 2), vae)
    features = _tiled_features(frames, pieces, vae, size)
    memory = [None] * _convolutions(encoder)
    out = []
    for piece in features:
        places = [0]
        x = encoder.mid_block(piece.to(vae.device), feat_cache=memory, feat_idx=places)
        x = encoder.nonlinearity(encoder.norm_out(x))
        out.append(_causal(encoder.conv_out, x, memory, places))
    return _mode(torch.cat(out, 2), vae)


def _tiled_features(
    frames: Callable[[int, int], Tensor],
    pieces: Iterable[tuple[int, int]],
    vae: Any,
    size: tuple[int, int],
) -> list[Tensor]:
    """What of the encoder is convolutions alone, tile by tile: its result for each piece of time,
    whole frames on the host."""
    encoder, scale = vae.encoder, vae.config.scale_factor_spatial
    pieces = list(pieces)
    shape = frames(*pieces[0]).shape
    features: list[Tensor] = []
    for tile in tiles(shape[3] // scale, shape[4] // scale, size):
        memory: Memory = [None] * _convolutions(encoder)
        held = tile.wider(_REACH_DOWN)
        rows, columns = held.scaled(scale).slices
        for index, piece in enumerate(pieces):
            places = [0]
            x = _patched(frames(*piece)[..., rows, columns], vae)
            x = _causal(encoder.conv_in, x, memory, places)
            for block in encoder.down_blocks:
                x = block(x, feat_cache=memory, feat_idx=places)
            if index == len(features):
                whole = (tile.rows.size, tile.columns.size)
                features.append(x.new_empty(*x.shape[:3], *whole, device=_HOST))
            features[index][..., tile.slices[0], tile.slices[1]] = tile.cut(x, held)
    return features


# Latent cells beyond an edge that a latent cell of the encoder sees: at eight pixels to a cell, its
# first convolution reaches 1 pixel, and then each of four levels 4 convolutions of 1, 2, 4 and 8
# pixels, with a convolution that reaches 2, 4 and 8 between them: 75 pixels.
_REACH_DOWN = 10


def _mode(out: Tensor, vae: Any) -> Tensor:
    """The mean of the latents' distribution; the other half is its deviation."""
    mean: Tensor = vae.quant_conv(out).chunk(2, dim=1)[0]
    return mean


def _causal(convolution: Any, x: Tensor, memory: Memory, places: list[int]) -> Tensor:
    """A causal convolution of x behind what it saw last, which is the two last frames."""
    place = places[0]
    seen = x[:, :, -2:].clone()
    if seen.shape[2] < 2 and memory[place] is not None:
        seen = torch.cat([memory[place][:, :, -1:], seen], dim=2)
    out: Tensor = convolution(x, memory[place])
    memory[place] = seen
    places[0] += 1
    return out


def _convolutions(module: Any) -> int:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(part, WanCausalConv3d) for part in module.modules())


def _patched(x: Tensor, vae: Any) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    size = vae.config.patch_size
    found: Tensor = x if size is None else patchify(x, patch_size=size)
    return found


def _unpatched(x: Tensor, vae: Any) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    size = vae.config.patch_size
    found: Tensor = x if size is None else unpatchify(x, patch_size=size)
    return found
