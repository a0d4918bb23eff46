"""NVFP4 inside a kernel: e2m1 values, two to a byte, and one e4m3 scale for each 16 of them.

The same code serves every GPU and the interpreter, so that its numbers are the same everywhere;
only the conversion to e2m1 takes Blackwell's instruction where there is one. Scales are handled as
the bytes of their e4m3 values: no GPU older than 8.9 converts to it, and the interpreter wrongly.
Ties round to even and what is too large saturates, as in :mod:`sagewan.reference.formats`.
"""

import triton
import triton.language as tl

GROUP = 16
_E2M1_MAX = tl.constexpr(6.0)
_E4M3_MAX = tl.constexpr(448.0)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMAL_STEP = tl.constexpr(2.0**-9)
# 1.5·2²³: adding it rounds a float32 to the nearest even integer, found in its lowest bits.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def e4m3_scale(x):
    """x float32, from 0 up → the byte of the nearest e4m3, and its value in float32."""
    x = tl.minimum(x, _E4M3_MAX)
    bits = x.to(tl.int32, bitcast=True)
    # Three bits of the mantissa stay; half of the last, and one more if it is odd, rounds to even.
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    normal = (kept << 20).to(tl.float32, bitcast=True)
    steps = (x * (1.0 / _SUBNORMAL_STEP) + _ROUND) - _ROUND
    is_normal = x >= _SMALLEST_NORMAL
    # Exponents are biased by 127 and by 7.
    code = tl.where(is_normal, kept - ((127 - 7) << 3), steps.to(tl.int32))
    value = tl.where(is_normal, normal, steps * _SUBNORMAL_STEP)
    return code.to(tl.uint8), value


@triton.jit
def _e2m1_code(x):
    """The four bits of the nearest of 0, ½, 1, 1½, 2, 3, 4, 6, and the sign."""
    size = tl.abs(x)
    # Where two are as near, the code that is even.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((x < 0).to(tl.int32) << 3)


@triton.jit
def e2m1_pairs(first, second, NATIVE: tl.constexpr):
    """Two float32 tensors → one byte for each pair, the first in the low half."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b8 a, b, c, d;
            cvt.rn.satfinite.e2m1x2.f32 a, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 c, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;
            mov.b32 $0, {a, b, c, d};
            }
            """,
            "=r,f,f,f,f,f,f,f,f",
            [first, second],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    return (_e2m1_code(first) | (_e2m1_code(second) << 4)).to(tl.uint8)


@triton.jit
def nvfp4(
    x, NATIVE: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """x [R, C] float32 → bytes [R, C/2] and the bytes of its scales [R, C/16]; groups run along C.

    What comes from 16 bit often lies just between two values: EXACT divides, so that ties are ties.
    """
    groups = x.reshape(ROWS, COLUMNS // 16, 16)
    top = tl.max(tl.abs(groups), 2)
    codes, values = e4m3_scale(tl.div_rn(top, _E2M1_MAX) if EXACT else top * (1.0 / _E2M1_MAX))
    # A group whose scale rounds to zero holds only zeros.
    divisor = tl.where(values > 0, values, float("inf"))
    if EXACT:
        scaled = tl.div_rn(groups, divisor[:, :, None] + tl.zeros_like(groups))
    else:
        scaled = groups * (1.0 / divisor)[:, :, None]
    first, second = tl.split(scaled.reshape(ROWS, COLUMNS // 2, 2))
    return e2m1_pairs(first, second, NATIVE), codes


@triton.jit
def unpacked(data, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes [R, C/2] and scales [R, C/16] → values [R, C] in float16, which holds them all."""
    byte = data.to(tl.int32)
    nibbles = tl.join(byte & 15, byte >> 4).reshape(ROWS, COLUMNS)
    # The bits of e2m1 at the place of float16's, and those of e4m3 one bit to the left, are 2⁻¹⁴
    # and 2⁻⁸ of their values, subnormal or not.
    bits = ((nibbles & 8) << 12) | ((nibbles & 7) << 9)
    values = bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0
    scales = (codes.to(tl.int16) << 7).to(tl.float16, bitcast=True) * 256.0
    groups = values.reshape(ROWS, COLUMNS // 16, 16) * scales[:, :, None]
    return groups.to(tl.float16).reshape(ROWS, COLUMNS)


@triton.jit
def power_of_two_scale(top):
    """The power of two that brings ``top`` within 448·6, a group's most, but not below 2⁻³⁰.

    A power of two changes no digit: what it scales rounds as without it.
    """
    wanted = tl.maximum(top * (1.0 / (_E4M3_MAX * _E2M1_MAX)), 2.0**-30)
    bits = wanted.to(tl.int32, bitcast=True)
    # Up to the next power of two, unless it is one.
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
