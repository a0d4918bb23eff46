"""Our attention modes beside torch's default attention: same inputs and run, preparation included.

    python -m benchmarks.attention --json FILE

Prints a table and writes the figures with the device, the versions and the date. Errors are
‖out − ref‖ / ‖ref‖ against float64 on 2 heads × 512 rows; times are medians of CUDA events.
"""

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from sagewan.kernels.fp8_attention import sageattn_3_fp8
from sagewan.kernels.int8_attention import sageattn, sageattn_3
from sagewan.reference.attention import attention, relative_error

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# (batch, heads, tokens): round numbers, and the tokens of 81 frames of Wan at 480 and 720 rows.
SHAPES = ((1, 40, 32768), (1, 40, 32760), (1, 10, 75776), (1, 10, 75600))
HEAD_DIM = 128
BASELINE = "torch SDPA"
MODES: Mapping[str, Attend] = {
    BASELINE: torch.nn.functional.scaled_dot_product_attention,
    "sageattn": sageattn,
    "sageattn_3": sageattn_3,
    "sageattn_3_fp8": sageattn_3_fp8,
}
# The most relative error of each mode on (bias, local).
LIMITS = {
    BASELINE: {"bias": 0.0019, "local": 0.0019},
    "sageattn": {"bias": 0.0020, "local": 0.0095},
    "sageattn_3": {"bias": 0.0019, "local": 0.0075},
    "sageattn_3_fp8": {"bias": 0.0045, "local": 0.029},
}
_WARM_UPS = 2
_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """One mode on one problem; ``ratio`` is how many times torch's speed it has."""

    mode: str
    shape: tuple[int, int, int]
    family: str
    error: float
    milliseconds: float
    tflops: float
    ratio: float


def bias(batch: int, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """K and V biased by channel as in Wan; every key counts."""
    k_bias, v_bias = (_normal(1, heads, 1, HEAD_DIM) for _ in range(2))
    q, k, v = (_normal(batch, heads, tokens, HEAD_DIM) for _ in range(3))
    return 1.5 * q, k + 3 * k_bias, v + 0.5 * v_bias


def local(batch: int, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like video: each query attends to its 64 neighbours, so that few keys carry the weight."""
    places = _normal(batch, heads, -(-tokens // 64), HEAD_DIM).repeat_interleave(64, 2)
    base = places[:, :, :tokens] + 0.5 * _normal(batch, heads, tokens, HEAD_DIM)
    q = 1.5 * base + 0.5 * _normal(batch, heads, tokens, HEAD_DIM)
    k = base + 3 * _normal(1, heads, 1, HEAD_DIM)
    return q, k, _normal(batch, heads, tokens, HEAD_DIM)


FAMILIES = {"bias": bias, "local": local}


def inputs(family: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, 128] in bfloat16, the same for every mode."""
    torch.manual_seed(0)
    q, k, v = (x.to(torch.bfloat16) for x in FAMILIES[family](*shape))
    return q, k, v


def error_of(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The relative error on 512 rows, spread evenly, of the first 2 heads."""
    rows = torch.linspace(0, q.shape[2] - 1, 512, device=q.device).long()
    output = attend(q, k, v)[:, :2, rows]
    return relative_error(output, attention(q[:, :2, rows], k[:, :2], v[:, :2]))


def milliseconds_of(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The median time of a call."""
    times = []
    for run in range(_WARM_UPS + _RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attend(q, k, v)
        end.record()
        end.synchronize()
        if run >= _WARM_UPS:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(family: str, shape: tuple[int, int, int]) -> list[Result]:
    """Every mode on one problem. Raises AssertionError for one that is not right."""
    q, k, v = inputs(family, shape)
    operations = 4 * shape[0] * shape[1] * shape[2] ** 2 * HEAD_DIM
    baseline = None
    results = []
    for mode, attend in MODES.items():
        error, limit = error_of(attend, q, k, v), LIMITS[mode][family]
        assert error <= limit, f"{mode} on {family} {shape}: error {error:.4f}, at most {limit}"
        milliseconds = milliseconds_of(attend, q, k, v)
        baseline = baseline or milliseconds
        results.append(
            Result(
                mode=mode,
                shape=shape,
                family=family,
                error=error,
                milliseconds=milliseconds,
                tflops=operations / milliseconds / 1e9,
                ratio=baseline / milliseconds,
            )
        )
    return results


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    path = parser.parse_args().json
    results = []
    print(f"{'':16}{'family':8}{'shape':>18}{'error':>9}{'ms':>9}{'TFLOPS':>8}{'ratio':>7}")
    for shape in SHAPES:
        for family in FAMILIES:
            for found in measure(family, shape):
                results.append(found)
                sides = "x".join(map(str, (*shape, HEAD_DIM)))
                print(
                    f"{found.mode:16}{family:8}{sides:>18}{found.error:9.5f}"
                    f"{found.milliseconds:9.2f}{found.tflops:8.0f}{found.ratio:7.2f}",
                    flush=True,
                )
    if path:
        report = {**machine(), "results": [asdict(found) for found in results]}
        path.write_text(json.dumps(report, indent=1) + "\n")


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


if __name__ == "__main__":
    main()
