"""What attention could do at most on a GPU: its matrix units and its exponentials, overlapped."""

import torch

# Operations, two to a multiply-add, on 16-bit numbers that a multiprocessor does in a clock, dense,
# adding in float32; 8 bit does twice as many, 4 bit four times. NVIDIA's white papers.
# Of consumer cards, whose rates depend on what they add in, nothing is claimed.
_OPERATIONS = {80: 2048, 90: 4096, 100: 8192, 103: 8192}
_FASTEST = {80: 8, 90: 8}
# One exponential a score, of which each takes 4·D operations; 16 a clock, 32 on 10.3.
_EXPONENTIALS = {103: 32}
_OPERATIONS_PER_SCORE = 4 * 128


def bits_of(arithmetic: str) -> int:
    """The bits of a row's product, from its words.

    >>> [bits_of(words) for words in ("16 bit", "int8 per block", "fp8 e4m3", "nvfp4", "fp16")]
    [16, 8, 8, 4, 16]
    """
    if "fp4" in arithmetic:
        return 4
    return 8 if "int8" in arithmetic or "fp8" in arithmetic else 16


def tflops(sm: int, device: torch.device, bits: tuple[int, int], clock: int | None) -> float | None:
    """The most at this clock, in 10¹² operations a second; None where it is not known."""
    if sm not in _OPERATIONS or clock is None:
        return None
    fewest = _FASTEST.get(sm, 4)
    rates = [_OPERATIONS[sm] * 16 / max(fewest, one) for one in bits]
    # Half of the operations are in each product; the exponentials run beside them.
    clocks = sum(0.5 / rate for rate in rates)
    exponentials = 1 / (_OPERATIONS_PER_SCORE * _EXPONENTIALS.get(sm, 16))
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return units * clock * 1e6 / max(clocks, exponentials) / 1e12


def clock_mhz(device: torch.device) -> int | None:
    """The multiprocessors' clock now; None where the driver does not tell."""
    import pynvml

    try:
        return int(torch.cuda.clock_rate(device))
    except (pynvml.NVMLError, RuntimeError):
        return None
