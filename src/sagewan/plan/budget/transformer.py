"""The transformer: its blocks' weights, and what a forward pass takes beside them."""

from dataclasses import dataclass
from math import prod

from sagewan.plan.layers import block_layers
from sagewan.plan.models import TEXT_TOKENS, Model

# Of a first and a last picture.
_PICTURE_TOKENS = 2 * 257


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
# projections, rotation.
_PER_CHUNK = 15
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
    preparing = chunk * width * _PER_CHUNK * dtype_bytes // 2
    if chunks.heads is None:
        preparing = max(preparing, tokens * width * (_INPUT * dtype_bytes + _ROUNDED))
    attended = tokens * heads * model.head_dim
    attending = attended * (dtype_bytes + (_QUANTISED_ATTENTION if quantised else 0))
    feeding = chunk * (model.ffn * 2 * dtype_bytes + width * 10)
    hidden = tokens * width * dtype_bytes
    return rotary + max(alive + max(preparing, attending), hidden + feeding)


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
