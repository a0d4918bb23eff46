"""The attention modes, their quality classes, what each falls back to, and the presets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType


class Quality(IntEnum):
    """How near a mode's result is to 16-bit attention; larger is nearer."""

    GOOD = 1
    VERY_GOOD = 2
    EXCELLENT = 3
    EXACT = 4


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A named arithmetic for self-attention: the formats of both products, and its use."""

    name: str
    qk: str
    pv: str
    preparation: str
    quality: Quality
    use: str
    fallback: str | None


_MODES = (
    Mode(
        name="sdpa",
        qk="16 bit",
        pv="16 bit",
        preparation="none",
        quality=Quality.EXACT,
        use="exact; most compatible",
        fallback=None,
    ),
    Mode(
        name="flash_attn",
        qk="16 bit",
        pv="16 bit",
        preparation="none",
        quality=Quality.EXACT,
        use="exact; long sequences",
        fallback="sdpa",
    ),
    Mode(
        name="sageattn",
        qk="int8 per block",
        pv="16 bit",
        preparation="K minus its mean over the sequence",
        quality=Quality.VERY_GOOD,
        use="very good; general",
        fallback="sdpa",
    ),
    Mode(
        name="sageattn_3",
        qk="int8 per block",
        pv="16 bit",
        preparation="Q and K smoothed, orthogonal rotation",
        quality=Quality.EXCELLENT,
        use="excellent; final renders",
        fallback="sageattn",
    ),
    Mode(
        name="sageattn_3_fp8",
        qk="int8 per block",
        pv="fp8 e4m3, two-level accumulation",
        preparation="Q and K smoothed, orthogonal rotation, V per channel",
        quality=Quality.VERY_GOOD,
        use="very good and fast",
        fallback="sageattn_3",
    ),
    Mode(
        name="sageattn_3_fp4",
        qk="nvfp4 (e2m1, one e4m3 scale per 16)",
        pv="nvfp4, two-level P",
        preparation="Q smoothed per block, K by its mean",
        quality=Quality.GOOD,
        use="good; previews",
        fallback="sageattn_3",
    ),
)

MODES: Mapping[str, Mode] = MappingProxyType({mode.name: mode for mode in _MODES})
AUTO = "auto"


def fallback_chain(name: str) -> tuple[str, ...]:
    """The mode and all it falls back to, in order: ``sageattn`` → ``("sageattn", "sdpa")``."""
    chain: list[str] = []
    step: str | None = name
    while step is not None:
        chain.append(step)
        step = MODES[step].fallback
    return tuple(chain)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A starting point that any field of the request overrides; for cards from ``from_gib``."""

    name: str
    attention: str
    quantization: str
    quality: Quality
    steps: int
    size: tuple[int, int]
    frames: int
    block_swap: int
    memory: str
    from_gib: int


_PRESETS = (
    Preset(
        name="low-vram",
        attention="sageattn_3_fp4",
        quantization="fp4_scaled",
        quality=Quality.GOOD,
        steps=4,
        size=(1280, 720),
        frames=61,
        block_swap=20,
        memory="8-12 GB",
        from_gib=8,
    ),
    Preset(
        name="balanced",
        attention="sageattn_3_fp8",
        quantization="fp8_scaled",
        quality=Quality.VERY_GOOD,
        steps=25,
        size=(1280, 720),
        frames=81,
        block_swap=12,
        memory="12-16 GB",
        from_gib=12,
    ),
    Preset(
        name="quality",
        attention="sageattn_3",
        quantization="fp8_scaled",
        quality=Quality.EXCELLENT,
        steps=40,
        size=(1920, 1080),
        frames=121,
        block_swap=0,
        memory="16 GB and more",
        from_gib=16,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _PRESETS})


def fitting_preset(memory_total: int) -> str:
    """The most demanding preset that is meant for a card with so many bytes; the least one for
    cards below them all."""
    # A card of 16 GB reports some hundred MB less than 16 GiB.
    gib = math.ceil(memory_total / 2**30)
    fitting = [preset.name for preset in _PRESETS if preset.from_gib <= gib]
    return fitting[-1] if fitting else _PRESETS[0].name
