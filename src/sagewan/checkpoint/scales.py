"""Whether scales can be right, from their values: the classic silent fault is weights that are read
without their scale, or with one that is broken, and make a white or noisy video."""

import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence

from sagewan.checkpoint.layers import FP8, Weight
from sagewan.checkpoint.tensors import Stored
from sagewan.errors import CheckpointError

# The largest number of each format: times its scale it is about the largest weight.
_LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0, "nvfp4": 448.0 * 6}
# A Wan matrix's largest weight is from some hundredths to some tens; what is this far off is wrong.
_PLAUSIBLE = (1e-7, 1e5)
# The root mean square of a Wan matrix is some hundredths; scaled to fill FP8 it is tens.
_UNSCALED_RMS = 4.0
_SAMPLE = 4096
_SAMPLES = 8


def check_scales(weights: Iterable[Weight]) -> None:
    """CheckpointError for the first weight whose float scales are zero, negative, not finite or
    implausible. Block scales, which are many, are checked when they are read."""
    unscaled = 0
    for weight in weights:
        for what, values in _scale_values(weight):
            # There are millions where each row has its own: look at each only if one is wrong.
            extremes = (min(values), max(values)) if math.isfinite(sum(values)) else values
            for value in extremes:
                _check_value(value, what, weight)
        if weight.is_packed and weight.format in FP8 and weight.scale is None:
            unscaled += 1
            if unscaled <= _SAMPLES:
                _check_unscaled(weight)


def _scale_values(weight: Weight) -> Iterator[tuple[str, Sequence[float]]]:
    scale = weight.scale
    if scale is not None and weight.format in (*FP8, "int8"):
        yield "scale", floats(scale)
    if "pre_quant_scale" in weight.beside:
        yield "pre_quant_scale", floats(weight.beside["pre_quant_scale"])
    for name in ("weight_scale_2", "weight_global_scale", "alpha", "input_global_scale"):
        if name in weight.beside and weight.format == "nvfp4":
            yield name, floats(weight.beside[name])


def _check_value(value: float, what: str, weight: Weight) -> None:
    data = weight.data
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            f"{data.file.path}: the {what} of {data.name} is {value:g}, which is no scale: "
            "fetch the file again"
        )
    largest = _LARGEST[weight.format] * value
    if what in ("scale", "weight_scale_2") and not _PLAUSIBLE[0] < largest < _PLAUSIBLE[1]:
        raise CheckpointError(
            f"{data.file.path}: the {what} of {data.name} is {value:g}, which would make weights "
            f"of up to {largest:.3g}: the file is damaged; fetch it again"
        )


def _check_unscaled(weight: Weight) -> None:
    """Numbers that fill FP8's range were divided by a scale, and it is not in the file."""
    data = weight.data
    values = _E4M3 if weight.format == "float8_e4m3fn" else _E5M2
    sample = [values[byte] for byte in data.head(_SAMPLE)]
    rms = math.sqrt(sum(value * value for value in sample) / max(len(sample), 1))
    if not rms < _UNSCALED_RMS:
        raise CheckpointError(
            f"{data.file.path}: {data.name} is quantised and its scale is missing (its values are "
            f"about {rms:.3g}, a weight's are below 1): choose a file that has its scales"
        )


def floats(stored: Stored) -> Sequence[float]:
    """The values of a small tensor of floats."""
    data = stored.head()
    if stored.dtype == "float32":
        return array("f", data)
    if stored.dtype == "bfloat16":
        return array("f", b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2)))
    return struct.unpack(f"<{len(data) // 2}e", data)


def _minifloat(byte: int, exponent_bits: int) -> float:
    """An 8-bit float of this many exponent bits; e4m3fn has no infinities and one NaN."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & (2**mantissa_bits - 1)
    last = exponent == 2**exponent_bits - 1
    if last and (exponent_bits == 5 or mantissa == 2**mantissa_bits - 1):
        return math.inf if exponent_bits == 5 and mantissa == 0 else math.nan
    fraction = mantissa / 2**mantissa_bits
    value = (
        math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias)
    )
    return -value if byte & 0x80 else value


_E4M3 = [_minifloat(byte, 4) for byte in range(256)]
_E5M2 = [_minifloat(byte, 5) for byte in range(256)]
