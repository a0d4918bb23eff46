"""Attention modes and their rivals on the same inputs in the same run, preparation included.

Each is held to float64 before it is timed. Errors are ‖out − ref‖ / ‖ref‖ on 512 rows of 2 heads,
times medians of CUDA events.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sagewan.attention import cudnn_fp8, peak
from sagewan.attention.launch import call, is_out_of_memory
from sagewan.attention.problems import LIMITS
from sagewan.attention.resolve import ImplementationError, load, one_line
from sagewan.plan.catalogue import ROWS, Implementation, Problem
from sagewan.plan.hardware import Device, Hardware
from sagewan.plan.modes import MODES
from sagewan.reference.attention import BLOCK, attention, relative_error

# Of q, k and v; a row's also takes ``block_mask``.
Attend = Callable[..., Tensor]
Shape = tuple[int, int, int]

HEAD_DIM = 128
BASELINE = "torch.sdpa"
FAMILIES = ("bias", "local")
# (batch, heads, tokens): round numbers, and the tokens of 81 frames of Wan at 480 and 720 rows.
SHAPES: tuple[Shape, ...] = ((1, 40, 32768), (1, 40, 32760), (1, 10, 75776), (1, 10, 75600))
SHAPES_ON_CPU: tuple[Shape, ...] = ((1, 2, 640),)
# The most error of our modes on 8,192 tokens and more, on ``bias`` and on ``local``; on fewer, and
# for packages, the limit is that of the mode's class.
OURS = {
    "sageattn": (0.0020, 0.0095),
    "sageattn_3": (0.0019, 0.0075),
    "sageattn_3_fp8": (0.0045, 0.029),
    "sageattn_3_fp4": (0.050, 0.150),
}
_LONG = 8192
_CUDNN_FP8_LIMITS = (0.25, 0.1)
_NEIGHBOURS = 64
_WARM_UPS = 2
_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """``bits`` are those that Q·Kᵀ and P·V multiply in; ``row`` is its row, if it has one;
    ``limits`` the most error on ``bias`` and ``local``."""

    name: str
    mode: str
    attend: Attend
    bits: tuple[int, int]
    limits: tuple[float, float]
    row: Implementation | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contestant on one problem. ``ratio`` is how many times torch's default speed it has,
    ``of_peak`` its share of what the device could do, ``extra_bytes`` its memory beyond inputs and
    output; None where that can't be known. ``wrong`` says why it was not timed. ``sparsity`` is the
    share of the blocks of keys that were left out, and ``of_dense`` how many times its own speed
    without that it then has."""

    name: str
    mode: str
    shape: Shape
    family: str
    error: float | None = None
    milliseconds: float | None = None
    tflops: float | None = None
    ratio: float | None = None
    of_peak: float | None = None
    extra_bytes: int | None = None
    clock_mhz: int | None = None
    wrong: str | None = None
    sparsity: float = 0.0
    of_dense: float | None = None


def contestants(
    device: Device, hardware: Hardware, modes: Sequence[str], *, emulate: bool = False
) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can be tried here for these modes, torch's default first, and why not others."""
    problem = Problem(head_dim=HEAD_DIM, dtype="bfloat16")
    chosen, refused = [], {}
    for row in ROWS:
        if row.name != BASELINE and (row.mode not in modes or (row.emulated and not emulate)):
            continue
        objection = row.objection(problem, device, hardware)
        if objection:
            refused[row.name] = objection.sentence()
            continue
        try:
            chosen.append(_of_row(row))
        except ImplementationError as error:
            refused[row.name] = error.objection.sentence()
    if device.is_cuda and "sdpa" in modes:
        chosen += [
            _of_torch("torch.sdpa FA2", SDPBackend.FLASH_ATTENTION),
            _of_torch("torch.sdpa cuDNN", SDPBackend.CUDNN_ATTENTION),
        ]
    if device.is_cuda and "sageattn_3_fp8" in modes:
        chosen.append(
            Contestant(
                name="cudnn sdpa_fp8",
                mode="fp8 per tensor",
                attend=cudnn_fp8.attention,
                bits=(8, 8),
                limits=_CUDNN_FP8_LIMITS,
            )
        )
    return sorted(chosen, key=lambda one: one.name != BASELINE), refused


def _of_row(row: Implementation) -> Contestant:
    function = load(row)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Tensor | None = None) -> Tensor:
        return call(function, row, q, k, v, block_mask=block_mask)[0]

    quality = MODES[row.mode].quality
    return Contestant(
        name=row.name,
        mode=row.mode,
        attend=attend,
        bits=(peak.bits_of(row.qk), peak.bits_of(row.pv)),
        limits=(LIMITS["bias"][quality], LIMITS["local"][quality]),
        row=row,
    )


def _of_torch(name: str, backend: SDPBackend) -> Contestant:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v)

    return Contestant(name=name, mode="sdpa", attend=attend, bits=(16, 16), limits=(0.01, 0.01))


def inputs(family: str, shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, 128] in bfloat16, the same for every contestant. K and V are biased by
    channel as in Wan; in ``bias`` every key counts, in ``local`` each query's 64 neighbours."""
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, tokens = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, HEAD_DIM, generator=generator, device=device)

    if family == "bias":
        k_bias, v_bias = normal(1, heads, 1), normal(1, heads, 1)
        q = 1.5 * normal(batch, heads, tokens)
        k = normal(batch, heads, tokens) + 3 * k_bias
        v = normal(batch, heads, tokens) + 0.5 * v_bias
    else:
        places = normal(batch, heads, -(-tokens // _NEIGHBOURS))
        base = places.repeat_interleave(_NEIGHBOURS, 2)[:, :, :tokens]
        base = base + 0.5 * normal(batch, heads, tokens)
        q = 1.5 * base + 0.5 * normal(batch, heads, tokens)
        k, v = base + 3 * normal(1, heads, 1), normal(batch, heads, tokens)
    return q.to(torch.bfloat16), k.to(torch.bfloat16), v.to(torch.bfloat16)


def some_blocks(tokens: int, share: float, device: torch.device) -> Tensor:
    """[1, 1, ⌈N/128⌉, ⌈N/128⌉] bool: each block of queries keeps its own block of keys and others
    by chance, the same for every contestant, as many in every row; ``share`` are left out."""
    count = -(-tokens // BLOCK)
    chance = torch.rand(count, count, generator=torch.Generator().manual_seed(0))
    kept = chance.fill_diagonal_(-1).argsort(1)[:, : max(1, round((1 - share) * count))]
    return (
        torch.zeros(1, 1, count, count, dtype=torch.bool)
        .scatter_(3, kept[None, None], True)
        .to(device)
    )


def error_of(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor | None = None
) -> float:
    """The relative error of the first 2 heads on up to 512 rows, spread evenly; with a mask, which
    the function is given, in up to 4 blocks."""
    if block_mask is None:
        count = min(512, q.shape[2])
        rows = torch.linspace(0, q.shape[2] - 1, count, dtype=torch.float64).long().to(q.device)
        output = attend(q, k, v)[:, :2, rows]
        return relative_error(output, attention(q[:, :2, rows], k[:, :2], v[:, :2]))
    output = attend(q, k, v, block_mask=block_mask)
    found, expected = [], []
    for block in torch.linspace(0, block_mask.shape[2] - 1, 4).long().unique().tolist():
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        found.append(output[:, :2, part])
        mask = block_mask[:, :, block : block + 1]
        expected.append(attention(q[:, :2, part], k[:, :2], v[:, :2], block_mask=mask))
    return relative_error(torch.cat(found, 2), torch.cat(expected, 2))


def measure(
    chosen: Sequence[Contestant],
    family: str,
    shape: Shape,
    device: Device,
    sparsities: Sequence[float] = (),
) -> Iterator[Measured]:
    """Each contestant on one problem, in turn; those that can, again with such shares of the blocks
    of keys left out. One that fails or is not right is not timed."""
    tensors = inputs(family, shape, device.torch_name)
    baseline = None
    for one in chosen:
        found = _measured(one, tensors, family, device, baseline)
        if one.name == BASELINE:
            baseline = found.milliseconds
        yield found
        for share in sparsities if one.row and one.row.block_mask else ():
            sparse = _measured(one, tensors, family, device, baseline, share=share)
            if sparse.milliseconds and found.milliseconds:
                sparse = replace(sparse, of_dense=found.milliseconds / sparse.milliseconds)
            yield sparse


def _measured(
    one: Contestant,
    tensors: tuple[Tensor, Tensor, Tensor],
    family: str,
    device: Device,
    baseline: float | None,
    *,
    share: float = 0.0,
) -> Measured:
    batch, heads, tokens, _ = tensors[0].shape
    shape = (batch, heads, tokens)
    mask = some_blocks(tokens, share, tensors[0].device) if share else None
    left_out = 0.0 if mask is None else 1 - float(mask.float().mean())
    found = Measured(name=one.name, mode=one.mode, shape=shape, family=family, sparsity=left_out)
    attend = one.attend if mask is None else partial(one.attend, block_mask=mask)
    try:
        error = error_of(one.attend, *tensors, mask)
    except Exception as failure:  # a rival may fail in any way; it is told, not hidden
        if is_out_of_memory(failure):
            torch.cuda.empty_cache()
        return replace(found, wrong=one_line(failure))
    # With fewer keys the error is that of a shorter sequence.
    limit = limit_of(one, family, tokens if mask is None else 0)
    if not error <= limit:
        return replace(found, error=error, wrong=f"error above {limit}")
    # Events and counts of memory are those of torch's current GPU.
    with torch.cuda.device_of(tensors[0]):
        extra = extra_bytes_of(attend, *tensors) if device.is_cuda else None
        milliseconds, clock = milliseconds_of(attend, *tensors)
    operations = 4 * batch * heads * tokens**2 * HEAD_DIM * (1 - left_out)
    best = peak.tflops(device.sm, tensors[0].device, one.bits, clock) if device.is_cuda else None
    tflops = operations / milliseconds / 1e9
    return replace(
        found,
        error=error,
        milliseconds=milliseconds,
        tflops=tflops,
        ratio=(baseline or milliseconds) / milliseconds,
        of_peak=tflops / best if best else None,
        extra_bytes=extra,
        clock_mhz=clock,
    )


def limit_of(one: Contestant, family: str, tokens: int) -> float:
    """The most error that a contestant may have on a problem."""
    ours = one.row is not None and one.row.call.startswith("sagewan.kernels.")
    limits = OURS[one.mode] if ours and tokens >= _LONG else one.limits
    return limits[FAMILIES.index(family)]


def extra_bytes_of(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> int:
    """The most device memory that a call takes beyond its inputs and its output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = attend(q, k, v)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.nbytes


def milliseconds_of(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, int | None]:
    """The median time of a call, and the multiprocessors' clock in MHz while it ran."""
    times, clock = [], None
    for run in range(_WARM_UPS + _RUNS):
        if not q.is_cuda:
            begin = time.perf_counter()
            attend(q, k, v)
            spent = (time.perf_counter() - begin) * 1000
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            attend(q, k, v)
            end.record()
            clock = peak.clock_mhz(q.device)
            end.synchronize()
            spent = start.elapsed_time(end)
        if run >= _WARM_UPS:
            times.append(spent)
    return statistics.median(times), clock
