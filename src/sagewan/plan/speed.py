"""How long a run takes, from a card's listed rates: minutes to plan with, not a promise."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from sagewan.plan.budget.vae import vae_costs
from sagewan.plan.hardware import Device
from sagewan.plan.layers import block_layers
from sagewan.plan.linear import NVFP4
from sagewan.plan.models import TEXT_TOKENS
from sagewan.plan.plan import Plan


@dataclass(frozen=True)
class Rate:
    """Dense tensor throughput in TFLOPS, from NVIDIA's tables and white papers: 16 bit and FP8
    with float32 accumulation (FP8 0 where the card has none), FP4, and INT8; and the memory's
    bandwidth in TB/s."""

    bits16: float
    fp8: float
    fp4: float
    int8: float
    bandwidth: float


def _ampere(bits16: float, bandwidth: float) -> Rate:
    return Rate(bits16, 0, 0, 4 * bits16, bandwidth)


def _ada(bits16: float, bandwidth: float) -> Rate:
    return Rate(bits16, 2 * bits16, 0, 4 * bits16, bandwidth)


def _blackwell(bits16: float, bandwidth: float) -> Rate:
    return Rate(bits16, 2 * bits16, 8 * bits16, 4 * bits16, bandwidth)


RATES: Mapping[str, Rate] = MappingProxyType(
    {
        "rtx-3060": _ampere(25.5, 0.36),
        "rtx-3090": _ampere(71, 0.936),
        "rtx-4060": _ada(30.2, 0.272),
        "rtx-4060-ti": _ada(44.1, 0.288),
        "rtx-4070": _ada(58.3, 0.504),
        "rtx-4080": _ada(97.5, 0.717),
        "rtx-4090": _ada(165.2, 1.008),
        "rtx-5060": _blackwell(38.4, 0.448),
        "rtx-5060-ti": _blackwell(47.4, 0.448),
        "rtx-5070": _blackwell(61.7, 0.672),
        "rtx-5080": _blackwell(112.6, 0.96),
        "rtx-5090": _blackwell(209.5, 1.792),
        "a100": Rate(312, 0, 0, 624, 2.039),
        "l40s": Rate(362, 733, 0, 733, 0.864),
        "h100": Rate(989, 1979, 0, 1979, 3.35),
        "h200": Rate(989, 1979, 0, 1979, 4.8),
        "b200": Rate(2250, 4500, 9000, 4500, 8.0),
    }
)

# What kernels reach of a listed rate: measured on an H100, torch's 16-bit products 75-80 % and its
# attention 60-66 %; FP8 products 68-75 %. The same is assumed of other cards.
_PRODUCTS = 0.7
_ATTENTION = 0.6
_OTHER = 1.12  # norms, rotations, copies
# Of the rate in 16 bit, its convolutions by their dtype: measured on an H100 at 832x480, 81 frames.
_VAE = {"bfloat16": 0.15, "float32": 0.088}
_TILED = 1.5  # a tile computes its neighbours' cells too
# Bytes a second from host memory: what eight lanes of PCIe 4 carry.
_LINK = 12e9


def card_of(device: Device) -> str | None:
    """The card's name in RATES, None if it is none of them.

    >>> card_of(Device(name="NVIDIA GeForce RTX 4060 Ti", sm=89))
    'rtx-4060-ti'
    """
    words = re.sub(r"[^a-z0-9]+", "-", device.name.lower())
    fitting = [name for name in RATES if re.search(rf"(^|-){name}(-|$)", words)]
    return max(fitting, key=len, default=None)


def estimated_seconds(plan: Plan) -> float | None:
    """Seconds of denoising and decoding by the card's listed rates; None for one not listed. With
    a step cache whose reuse is not known beforehand, at most so many."""
    card = card_of(plan.device)
    if card is None:
        return None
    rate, passes = RATES[card], sum(plan.steps.passes)
    if plan.cache and plan.cache.reused is not None:
        passes -= plan.cache.reusable
    swapped = plan.memory.block_swap * _block_bytes(plan)
    forward = max(_forward_seconds(plan, rate), swapped / _LINK)
    return passes * forward + _decode_seconds(plan, rate)


def _forward_seconds(plan: Plan, rate: Rate) -> float:
    model, tokens = plan.model, plan.tokens
    width = model.heads * model.head_dim
    matrices = sum(prod(layer.shape) for layer in block_layers(model))
    products = 2 * matrices * tokens * model.layers
    cross = 4 * tokens * TEXT_TOKENS * width * model.layers
    skipped = 0.0
    if plan.sparsity:
        skipped = plan.sparsity.skipped_of_all(range(plan.steps.count), model.layers)
    each = 2 * tokens**2 * width * model.layers * (1 - skipped)
    first = rate.int8 if plan.attention.main.row.qk.startswith("int8") else rate.bits16
    # Exponentials are computed either way, so 8 bits gain half of what they promise.
    scores = each / min(first, 1.5 * rate.bits16) + each / rate.bits16
    speed = rate.bits16
    main = plan.weights.main
    if main is not None and main.low:
        speed = max(rate.bits16, rate.fp4 if plan.weights.format == NVFP4 else 0, rate.fp8)
    seconds = products / (speed * _PRODUCTS) + (scores + cross / rate.bits16) / _ATTENTION
    return seconds / 1e12 * _OTHER


def _decode_seconds(plan: Plan, rate: Rate) -> float:
    pixels = plan.frames * prod(plan.grid_size)
    tiled = _TILED if plan.memory.decode_tile else 1.0
    return (
        pixels
        * tiled
        * vae_costs(plan.model).operations
        / (rate.bits16 * _VAE[plan.decoding.dtype] * 1e12)
    )


def _block_bytes(plan: Plan) -> float:
    return plan.weight_bytes / plan.model.experts / plan.model.layers
