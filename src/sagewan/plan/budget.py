"""What a run takes of the device's and the host's memory, stage by stage, in bytes.

Activations were counted at full width on the meta device (``sagewan.memory.meter``): live tensors,
not the workspaces of libraries. A test counts them again. What only a GPU shows (its context, its
libraries, what its allocator loses) are constants with a name, to be corrected by
``benchmarks/memory.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from sagewan.plan.decoding import EXACT, Decoding
from sagewan.plan.layers import block_layers
from sagewan.plan.models import TEXT_TOKENS, Model

MIB = 2**20
GIB = 2**30

# A CUDA context with its kernels, and what stays of cuBLAS's workspaces in torch's cache: together
# 1.061 GiB between two runs (H100, torch 2.11+cu130), of which 0.69 to 0.77 were not torch's.
CONTEXT = 768 * MIB
WORKSPACE = 320 * MIB
# What the caching allocator can't use for its blocks' sizes, of all that a stage allocates beyond
# its weights; for the VAE with cuDNN's workspaces: torch would hold up to 1.87 times the live
# tensors of whole frames and 1.93 times those of tiles, and nine shapes went in these (H100).
FRAGMENTATION = 0.06
VAE_FRAGMENTATION = 0.65
TILE_FRAGMENTATION = 0.9
# Python, torch, its libraries and the models' code, on the host: 1.2 to 1.5 GiB (H100).
PROCESS = 1408 * MIB
# Weights go to a GPU through two pinned buffers of this size, which torch keeps for the next.
UPLOAD = 32 * MIB
UPLOADS = 2
# Pieces of the video in pinned memory at once, on their way from a GPU (H100).
_PIECES = 4

# UMT5-XXL: its table of words, and one of its blocks, in parameters.
_UMT5_WORDS = 256_384 * 4096
_UMT5_BLOCK = 193_000_000
UMT5_BLOCKS = 24
# Its activations, for each byte of a number: attention over 512 tokens by 64 heads.
_UMT5_ACTIVATIONS = 60 * MIB
_CLIP = 632_000_000
_CLIP_ACTIVATIONS = 128 * MIB
# Of a first and a last picture.
_PICTURE_TOKENS = 2 * 257


@dataclass(frozen=True)
class Item:
    """One line of the sum, in bytes; ``pinned`` is the part of ``host`` that can't be paged out,
    ``mapped`` the part that is a file's pages, which the system can take back at any time."""

    name: str
    device: int = 0
    host: int = 0
    pinned: int = 0
    mapped: int = 0


@dataclass(frozen=True)
class Stage:
    """What is in memory at once while one part of the run works; ``lost`` is what the allocator and
    libraries take beside the activations, as a share of them."""

    name: str
    items: tuple[Item, ...]
    lost: float = FRAGMENTATION

    @property
    def device(self) -> int:
        return sum(item.device for item in self.items)

    @property
    def host(self) -> int:
        """Bytes that must be there: the pages of files are not counted."""
        return sum(item.host for item in self.items)

    @property
    def pinned(self) -> int:
        return sum(item.pinned for item in self.items)


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


def block_parameters(model: Model) -> int:
    """Numbers in one of the transformer's blocks."""
    width = model.heads * model.head_dim
    layers = block_layers(model)
    matrices = sum(prod(layer.shape) + layer.outputs for layer in layers)
    norms = (4 + 2 + (1 if model.image_encoder else 0)) * width
    return matrices + norms + 6 * width


@dataclass(frozen=True)
class Weights:
    """Bytes of one transformer: each of its blocks, and what is around them."""

    block: int
    around: int

    @classmethod
    def of(cls, model: Model, transformer_bytes: int, dtype_bytes: int) -> "Weights":
        around = (model.parameters - model.layers * block_parameters(model)) * dtype_bytes
        return cls((transformer_bytes - around) // model.layers, around)


@dataclass(frozen=True)
class Chunks:
    """How a block computes: tokens and heads at a time; None is all."""

    tokens: int | None
    heads: int | None


# Below this, a whole sequence at once takes less than a block's weights.
_WHOLE = 8192
# With so many the products are as fast as with any more, and what is between them starts in time.
_ROOMY = 16_384
# Rows that still fill a large GPU's multiplications (160 to 640 tiles of 128×256).
_SHORT, _LONG, _MANY = 2048, 4096, 65_536
_HEADS = 8


def roomy_chunks(tokens: int) -> Chunks:
    """The fastest chunks, where memory does not matter."""
    return Chunks(None if tokens <= _ROOMY else _ROOMY, None)


def usual_chunks(model: Model, tokens: int) -> Chunks:
    """Chunks that cost a few hundredths of the time, and take little memory."""
    if tokens <= _WHOLE:
        return Chunks(None, None)
    heads = _HEADS if model.heads > _HEADS else None
    return Chunks(_SHORT if tokens < _MANY else _LONG, heads)


def small_chunks() -> Chunks:
    """The chunks of a run that is short of memory."""
    return Chunks(1024, 1)


# Bytes a token's feature takes on the way through a chunk: float32 norm and product, 16-bit input,
# projections, rotation; and for a whole sequence also the feed-forward's.
_PER_CHUNK = 15
_PER_WHOLE = 38
# Q, K, V and the hidden state.
_ALIVE = 4
# Where all heads are attended at once, Q, K and V are made of all tokens' input at once: that is
# alive too, in 16 bit, and in the 8 bit that some products round it to.
_INPUT = 1
_ROUNDED = 1
# What a quantised attention makes of the heads it attends: smoothed, rotated and packed copies.
_QUANTISED_ATTENTION = 6


def activations(
    model: Model, tokens: int, dtype_bytes: int, chunks: Chunks, *, quantised: bool
) -> int:
    """The most of a forward pass of the transformer, beyond weights."""
    width = model.heads * model.head_dim
    chunk = tokens if chunks.tokens is None else min(chunks.tokens, tokens)
    heads = model.heads if chunks.heads is None else min(chunks.heads, model.heads)
    rotary = 2 * 4 * tokens * model.head_dim
    alive = _ALIVE * tokens * width * dtype_bytes
    per = _PER_WHOLE if chunks.tokens is None else _PER_CHUNK
    preparing = chunk * width * per * dtype_bytes // 2
    if chunks.heads is None:
        preparing = max(preparing, tokens * width * (_INPUT * dtype_bytes + _ROUNDED))
    attended = tokens * heads * model.head_dim
    attending = attended * (dtype_bytes + (_QUANTISED_ATTENTION if quantised else 0))
    feeding = chunk * (model.ffn * 2 * dtype_bytes + width * 10)
    hidden = tokens * width * dtype_bytes
    return rotary + max(alive + max(preparing, attending), hidden + feeding)


def text_staging(swapped: int, dtype_bytes: int) -> int:
    """Bytes of the two pinned buffers through which the text encoder's swapped blocks pass. It runs
    once or twice, so pinning them all would take longer than it gains, and up to 8.6 GiB."""
    return 2 * _UMT5_BLOCK * dtype_bytes if swapped else 0


def text_stage(model: Model, dtype_bytes: int, swapped: int, *, on_device: bool) -> Stage:
    """The text encoder, of whose blocks so many are swapped."""
    if model.is_demo:
        return Stage("text", _placed("text encoder", 2_200_000, 0, on_device=on_device))
    words, block = _UMT5_WORDS * dtype_bytes, _UMT5_BLOCK * dtype_bytes
    resident = words + (UMT5_BLOCKS - swapped + min(2, swapped)) * block
    pinned, whole = text_staging(swapped, dtype_bytes), UMT5_BLOCKS * block + words
    # In another dtype than its files have (those of Wan 2.1 are float32, others bfloat16, which is
    # assumed where they were not looked at) it is made anew, whole on the host.
    stored = model.dtypes.get("text_encoder", "bfloat16")
    anew = stored != ("float32" if dtype_bytes > 2 else "bfloat16")
    host, mapped = (pinned + whole, 0) if anew else (pinned, whole)
    items = (
        Item("text encoder", resident if on_device else 0, host, pinned, mapped),
        Item("activations", *_where(_UMT5_ACTIVATIONS * dtype_bytes, on_device=on_device)),
    )
    return Stage("text", items)


def picture_stage(
    model: Model, size: tuple[int, int], tile: tuple[int, int] | None, *, on_device: bool
) -> Stage:
    """CLIP (Wan 2.1), then the VAE's encoder; they are never there together. ``size`` and ``tile``
    are (rows, columns) of latent cells."""
    costs = vae_costs(model)
    sums = [("VAE encoder", costs.weights, encode_bytes(model, size, tile))]
    if model.image_encoder:
        sums.append(("picture encoder", _CLIP * 4, _CLIP_ACTIVATIONS))
    name, weights, active = max(sums, key=lambda sum_: sum_[1] + sum_[2])
    items = (
        *_placed(name, weights, 0, on_device=on_device),
        *_placed("activations", active, 0, on_device=on_device),
    )
    return Stage("picture", items, _lost(tile))


def encode_bytes(model: Model, size: tuple[int, int], tile: tuple[int, int] | None) -> int:
    costs = vae_costs(model)
    if tile is None:
        return costs.encode * prod(size)
    held = (min(a, b + 2 * _ENCODE_MARGIN) for a, b in zip(size, tile, strict=True))
    return costs.encode * prod(held) + costs.small_end * prod(size)


def decode_stage(
    model: Model,
    shape: tuple[int, int, int],
    tile: tuple[int, int] | None,
    *,
    on_device: bool,
    staying: int = 0,
    decoding: Decoding = EXACT,
) -> Stage:
    """The VAE's decoder; ``shape`` is (frames, rows, columns) of the latents, ``staying`` the bytes
    of the transformer that stays on the device meanwhile."""
    costs = vae_costs(model)
    frames, rows, columns = shape
    pixels = (4 * (frames - 1) + 1) * rows * columns * model.spatial**2 * 3
    features = frames * rows * columns * costs.features * decoding.number_bytes // 4
    waiting = 0 if tile is None else features + pixels
    sent = sent_bytes(shape, model, decoding) if on_device and tile is None else 0
    active = decode_bytes(model, (rows, columns), tile, decoding)
    return Stage(
        "decode",
        (
            *_placed("VAE", costs.weights * decoding.number_bytes // 4, 0, on_device=on_device),
            *_placed("activations", active, waiting, on_device=on_device),
            Item("frames on their way", 0, sent, sent),
            Item("waiting transformer", staying),
        ),
        _lost(tile),
    )


def _lost(tile: tuple[int, int] | None) -> float:
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


def with_overhead(stage: Stage, *, on_device: bool) -> Stage:
    """The stage with what every one has: the process, and on a GPU its context."""
    host = Item("process", 0, PROCESS)
    if not on_device:
        return replace(stage, items=(*stage.items, host))
    moving = sum(item.device for item in stage.items if item.name == "activations")
    return replace(
        stage,
        items=(
            *stage.items,
            Item("workspaces and fragmentation", int(stage.lost * moving)),
            Item("CUDA context and libraries", CONTEXT + WORKSPACE),
            Item("buffers of copies", 0, UPLOADS * UPLOAD, UPLOADS * UPLOAD),
            host,
        ),
    )


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


def _placed(name: str, device: int, host: int, *, on_device: bool) -> tuple[Item, ...]:
    return (Item(name, device, host),) if on_device else (Item(name, 0, device + host),)


def _where(nbytes: int, *, on_device: bool) -> tuple[int, int]:
    return (nbytes, 0) if on_device else (0, nbytes)


def text_keys_bytes(model: Model, texts: int, dtype_bytes: int) -> int:
    """Keys and values of ``texts`` texts, and of the pictures that stand before them in Wan 2.1,
    in every block."""
    tokens = TEXT_TOKENS + (_PICTURE_TOKENS if model.image_encoder else 0)
    return texts * model.layers * tokens * 2 * model.heads * model.head_dim * dtype_bytes


def conditions_bytes(model: Model, shape: tuple[int, int, int], dtype_bytes: int) -> int:
    """What stays on the device through all steps: text, latents, what the sampler remembers."""
    latents = prod(shape) * 4
    text = 2 * TEXT_TOKENS * 4096 * dtype_bytes
    return text + latents * (6 * model.latent_channels + model.in_channels)
