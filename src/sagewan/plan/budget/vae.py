"""The VAE, which reads pictures and writes frames, and CLIP, which reads pictures as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from sagewan.plan.budget.needs import Needs
from sagewan.plan.budget.stage import Item, Stage, placed
from sagewan.plan.decoding import EXACT, Decoding
from sagewan.plan.hardware import MIB
from sagewan.plan.models import Model

# What the caching allocator can't use, of the live tensors, cuDNN's workspaces included: torch
# would hold up to 1.87 times those of whole frames and 1.93 times those of tiles, and nine shapes
# went in these (H100).
VAE_FRAGMENTATION = 0.65
TILE_FRAGMENTATION = 0.9
# Where segments grow: ten shapes went in 0.93 to 1.14 times the live tensors, and where there was
# room torch held 1.09 to 1.59 times them, more of longer videos (H100).
GROWING_FRAGMENTATION = 0.4
# Pieces of the video in pinned memory at once, on their way from a GPU (H100).
_PIECES = 4
_CLIP = 632_000_000
_CLIP_ACTIVATIONS = 128 * MIB


@dataclass(frozen=True)
class VaeCosts:
    """Bytes of the VAE in float32, a latent cell: decoding whole and in tiles (which bring cells of
    their neighbours along), the small end that always runs whole, and encoding; ``features`` is
    what of one cell of one latent frame waits on the host for its tile; ``operations`` the
    multiplications and additions for one pixel of one frame."""

    weights: int
    whole: int
    tiled: int
    margin: int
    small_end: int
    encode: int
    features: int
    operations: float


_KIB = 1024
# Counted at 480×832 to 1080×1920 in many tiles, within 10 %.
_VAE_2_1 = VaeCosts(507_600_000, 1219 * _KIB, 1030 * _KIB, 8, 31 * _KIB, 883 * _KIB, 1536, 8.7e6)
_VAE_2_2 = VaeCosts(
    2_819_000_000, 5410 * _KIB, 4900 * _KIB, 4, 82 * _KIB, 1808 * _KIB, 4096, 18.9e6
)
_VAE_DEMO = VaeCosts(12_000_000, 560 * _KIB, 510 * _KIB, 4, 9 * _KIB, 190 * _KIB, 384, 2e5)
# Cells that a tile of the encoder brings along on each side.
_ENCODE_MARGIN = 10


def vae_costs(model: Model) -> VaeCosts:
    """Those of the model's VAE: Wan 2.1's, or TI2V's with its larger cells."""
    if model.is_demo:
        return _VAE_DEMO
    return _VAE_2_1 if model.spatial == 8 else _VAE_2_2


def picture_stage(needs: Needs, tile: tuple[int, int] | None) -> Stage:
    """CLIP (Wan 2.1), then the VAE's encoder; they are never there together. ``tile`` is (rows,
    columns) of latent cells."""
    model, on_device, costs = needs.model, needs.on_device, vae_costs(needs.model)
    sums = [("VAE encoder", costs.weights, encode_bytes(model, needs.cells, tile))]
    if model.image_encoder:
        sums.append(("picture encoder", _CLIP * 4, _CLIP_ACTIVATIONS))
    name, weights, active = max(sums, key=lambda sum_: sum_[1] + sum_[2])
    items = (
        *placed(name, weights, 0, on_device=on_device),
        *placed("activations", active, 0, on_device=on_device),
    )
    return Stage("picture", items, _lost(needs, tile))


def encode_bytes(model: Model, size: tuple[int, int], tile: tuple[int, int] | None) -> int:
    costs = vae_costs(model)
    if tile is None:
        return costs.encode * prod(size)
    held = (min(a, b + 2 * _ENCODE_MARGIN) for a, b in zip(size, tile, strict=True))
    return costs.encode * prod(held) + costs.small_end * prod(size)


def decode_stage(needs: Needs, tile: tuple[int, int] | None, staying: int = 0) -> Stage:
    """The VAE's decoder; ``staying`` are the bytes of the transformer that stays on the device
    meanwhile."""
    model, on_device, decoding = needs.model, needs.on_device, needs.decoding
    costs = vae_costs(model)
    frames, rows, columns = needs.shape
    pixels = (4 * (frames - 1) + 1) * rows * columns * model.spatial**2 * 3
    features = frames * rows * columns * costs.features * decoding.number_bytes // 4
    waiting = 0 if tile is None else features + pixels
    sent = sent_bytes(needs.shape, model, decoding) if on_device and tile is None else 0
    active = decode_bytes(model, (rows, columns), tile, decoding)
    weights = costs.weights * decoding.number_bytes // 4
    # In another dtype or layout than its files have, it is made anew on its way to the device.
    anew = weights if decoding.rounds else 0
    return Stage(
        "decode",
        (
            *placed("VAE", weights, anew, on_device=on_device),
            *placed("activations", active, waiting, on_device=on_device),
            Item("frames on their way", 0, sent, sent),
            Item("waiting transformer", staying),
        ),
        _lost(needs, tile),
    )


def _lost(needs: Needs, tile: tuple[int, int] | None) -> float:
    if needs.segments_grow:
        return GROWING_FRAGMENTATION
    return VAE_FRAGMENTATION if tile is None else TILE_FRAGMENTATION


def sent_bytes(shape: tuple[int, int, int], model: Model, decoding: Decoding) -> int:
    """Pinned bytes through which frames leave a GPU; torch rounds each up to a power of two."""
    _, rows, columns = shape
    piece = decoding.at_once * model.temporal * rows * columns * model.spatial**2 * 3
    return int(_PIECES * 2 ** (piece - 1).bit_length())


def decode_bytes(
    model: Model,
    size: tuple[int, int],
    tile: tuple[int, int] | None,
    decoding: Decoding = EXACT,
) -> int:
    """The most that decoding takes beyond the VAE's weights; (rows, columns) of latent cells."""
    costs, number = vae_costs(model), decoding.number_bytes
    if tile is None:
        return costs.whole * prod(size) * decoding.at_once * number // 4
    held = (min(a, b + costs.margin) for a, b in zip(size, tile, strict=True))
    return max(costs.tiled * prod(held), costs.small_end * prod(size)) * number // 4


@cache
def tile_sizes(size: tuple[int, int]) -> Sequence[tuple[int, int]]:
    """Ways to cut (rows, columns) of latent cells, the largest tiles first: those are quickest, as
    each brings its neighbours' cells along."""
    rows, columns = size
    cuts = {
        (-(-rows // down), -(-columns // across))
        for down in range(1, 1 + max(1, rows // 6))
        for across in range(1, 1 + max(1, columns // 6))
    }
    return sorted(cuts, key=lambda cut: (-prod(cut), abs(cut[0] - cut[1])))
