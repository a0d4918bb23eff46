"""The least time that a layer's arithmetic takes at a card's listed rates, and its roofline."""

from dataclasses import dataclass
from math import prod

from sagewan.bench.case import Case
from sagewan.plan.layers import Layer, Role
from sagewan.plan.models import TEXT_TOKENS
from sagewan.plan.speed import Rate

_BYTES = 2  # of an activation in 16 bit


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The bits in which a layer multiplies: ``products`` by its matrices (but keys and values of
    the text, which stay in 16), ``scores`` in Q·Kᵀ and ``values`` in P·V of self-attention."""

    products: int = 16
    scores: int = 16
    values: int = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a layer does at least: operations (two to a multiply-add), and bytes that must be read
    and written if nothing but products touches memory."""

    operations: float
    bytes: float


def products(case: Case, arithmetic: Arithmetic, *, keeps_text: bool = False) -> Work:
    """The products by a block's matrices: each reads its rows and weight, and writes its result;
    with ``keeps_text`` of a pass that has the text's keys and values already."""
    layers = _multiplied(case, keeps_text=keeps_text)
    operations = sum(2 * prod(layer.shape) * case.rows(layer) for layer in layers)
    moved = sum(
        prod(layer.shape) * _bits(layer.role, arithmetic) / 8
        + case.rows(layer) * sum(layer.shape) * _BYTES
        for layer in layers
    )
    return Work(operations=operations, bytes=moved)


def _multiplied(case: Case, *, keeps_text: bool) -> list[Layer]:
    """The matrices that a pass multiplies by."""
    return [
        layer for layer in case.layers if not (keeps_text and layer.role == Role.CROSS_KEY_VALUE)
    ]


def attention(case: Case) -> Work:
    """Self-attention and cross-attention: each reads Q, K and V, and writes its result."""
    rows, width = case.tokens, case.width
    return Work(
        operations=4 * rows * (rows + TEXT_TOKENS) * width,
        bytes=(4 * rows + 2 * (rows + TEXT_TOKENS)) * width * _BYTES,
    )


def floor_ms(case: Case, arithmetic: Arithmetic, rate: Rate, *, keeps_text: bool = False) -> float:
    """Milliseconds of a layer's products and attention at the listed rates, nothing overlapped;
    with ``keeps_text`` of a pass that has the text's keys and values already."""
    seconds = 0.0
    for layer in _multiplied(case, keeps_text=keeps_text):
        speed = _speed(_bits(layer.role, arithmetic), rate)
        seconds += 2 * prod(layer.shape) * case.rows(layer) / speed
    each = 2 * case.tokens**2 * case.width
    seconds += each / _speed(arithmetic.scores, rate) + each / _speed(arithmetic.values, rate)
    seconds += 4 * case.tokens * TEXT_TOKENS * case.width / _speed(16, rate)
    return seconds / 1e9


def _bits(role: Role, arithmetic: Arithmetic) -> int:
    return 16 if role == Role.CROSS_KEY_VALUE else arithmetic.products


def _speed(bits: int, rate: Rate) -> float:
    """TFLOPS; formats that a card does not multiply in are multiplied in the next wider one."""
    wide = max(rate.fp8, rate.int8, rate.bits16)
    return {16: rate.bits16, 8: wide, 4: max(rate.fp4, wide)}[bits]
