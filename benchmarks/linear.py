"""Quantised linear layers on one GPU: correct first, then times against bf16, and bytes.

    python -m benchmarks.linear [--json FILE] [--skip times|few|bytes]

Times are medians of CUDA events around captured graphs, the ways to multiply in turns, everything
between the bf16 input and the bf16 output included: so the GPU's time alone is measured, as in a
run, where launches are queued ahead. Of few rows every call reads another copy of the weight, as a
model's layers do; beside the GPU's time stands that of calls one after the other without a graph.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagewan.checkpoint.packed import unpack
from sagewan.checkpoint.quantize import pack
from sagewan.kernels.fp8_linear import quantize_rows
from sagewan.kernels.nvfp4_unpack import unpack_e4m3
from sagewan.model import matmul
from sagewan.plan.models import PUBLISHED
from sagewan.plan.weights import weight_bytes

TOKENS = 32768
SHAPES = ((5120, 13824), (5120, 5120), (13824, 5120))  # K → N
# Ways to multiply by format, and the most each may differ from the stored weight's exact product.
WAYS: dict[str, tuple[str, Callable[..., Tensor], float]] = {
    "fp8_scaled": ("float8_e4m3fn", matmul.fp8_rows, 0.04),
    "fp4_scaled": ("nvfp4", matmul.fp8_rows_of_nvfp4, 0.06),
    "fp4, unpacked to 16 bit": ("nvfp4", matmul.nvfp4_unpacked, 0.01),
    "fp8, unpacked to 16 bit": ("float8_e4m3fn", matmul.unpacked, 0.01),
}
FEW = (1, 2, 4)
# What is promised, against bf16 in the same run.
WANTED = {"fp8_scaled": 1.6, "fp4_scaled": 1.5}
# More than the GPU's caches hold.
_COPIES_BYTES = 300e6
Runs = dict[str, list[Callable[[], Any]]]


def captured(runs: list[Callable[[], Any]]) -> Callable[[], None]:
    """A graph of these calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def in_turns(runs: Runs, rounds: int = 9) -> dict[str, float]:
    """Milliseconds of a call of each, the median over rounds in which each has its turn."""
    replays = {name: captured(calls) for name, calls in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            if turn >= 2:  # two that warm up
                times[name].append(start.elapsed_time(end) / len(runs[name]))
    return {name: statistics.median(taken) for name, taken in times.items()}


def called(runs: list[Callable[[], Any]], rounds: int = 5) -> float:
    """Milliseconds of a call, many one after the other as Python makes them."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            for run in runs:
                run()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / (4 * len(runs)) * 1e3)
    return statistics.median(taken)


def assert_correct(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor, limit: float) -> float:
    """Against float64 on a sample of rows."""
    rows = torch.linspace(0, x.shape[0] - 1, min(64, x.shape[0]), device=x.device).long()
    exact = F.linear(x[rows].double(), weight.double(), bias.double())
    error = float((found[rows].double() - exact).norm() / exact.norm())
    assert error < limit, f"error {error:.3g}, and the limit is {limit}"
    return error


def timings() -> list[dict[str, Any]]:
    """Many rows."""
    rows = []
    for inputs, outputs in SHAPES:
        weight, bias = _layer(inputs, outputs)
        x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
        runs: Runs = {"bf16": [partial(F.linear, x, weight, bias)] * 2}
        errors = {}
        for name, (format_, function, limit) in WAYS.items():
            packed = pack(weight, format_)
            errors[name] = _error(partial(function, x, packed, bias), x, packed, bias, limit)
            runs[name] = [partial(function, x, packed, bias)] * 2
        times = in_turns(runs)
        for name, error in errors.items():
            wanted = WANTED.get(name) if inputs != 13824 else None
            rows.append(_row((TOKENS, inputs, outputs), name, times, wanted) | {"error": error})
        del runs, packed, weight
        torch.cuda.empty_cache()
    return rows


def few() -> list[dict[str, Any]]:
    """A few rows, whose time is that of reading the weight."""
    rows = []
    for inputs, outputs in SHAPES[:2]:  # of one row by 13,824 columns cuBLAS has no FP8 product
        copies = [_layer(inputs, outputs) for _ in range(round(_COPIES_BYTES / inputs / outputs))]
        packed = {
            name: [pack(weight, WAYS[name][0]) for weight, _ in copies]
            for name in ("fp8_scaled", "fp4_scaled")
        }
        for count in FEW:
            x = torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)
            runs: Runs = {"bf16": [partial(F.linear, x, w, bias) for w, bias in copies]}
            errors = {}
            for name, weights in packed.items():
                pairs = zip(weights, copies, strict=True)
                runs[name] = [partial(matmul.thin, x, one, bias) for one, (_, bias) in pairs]
                errors[name] = _error(runs[name][0], x, weights[0], copies[0][1], 0.01)
            pairs = zip(packed["fp8_scaled"], copies, strict=True)
            rounded = [partial(matmul.fp8_rows, x, one, bias) for one, (_, bias) in pairs]
            runs["fp8_scaled, input rounded too"] = rounded
            times = in_turns(runs)
            calls = {name: called(run) for name, run in runs.items()}
            for name in (name for name in runs if name != "bf16"):
                wanted = 1.0 if count == 1 and name in errors else None
                row = _row((count, inputs, outputs), name, times, wanted)
                row |= {"bf16_called_ms": calls["bf16"], "called_ms": calls[name]}
                print(f"    called: {calls['bf16'] / calls[name]:.2f}× ({calls[name]:.4f} ms)")
                rows.append(row | {"error": errors.get(name)})
    return rows


def _layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    return weight, torch.randn(outputs, device="cuda", dtype=torch.bfloat16)


def _error(run: Callable[[], Tensor], x: Tensor, packed: Any, bias: Tensor, limit: float) -> float:
    return assert_correct(run(), x, unpack(packed, torch.float32), bias, limit)


def _row(
    sizes: tuple[int, int, int], name: str, times: dict[str, float], wanted: float | None
) -> dict[str, Any]:
    tokens, inputs, outputs = sizes
    base, own = times["bf16"], times[name]
    print(
        f"[{tokens}×{inputs}→{outputs}] {name:29} {own:8.4f} ms, bf16 {base:8.4f} ms: "
        f"{base / own:5.2f}×{'' if wanted is None else f' (wanted {wanted})'}",
        flush=True,
    )
    return {
        "tokens": tokens,
        "inputs": inputs,
        "outputs": outputs,
        "way": name,
        "bf16_ms": base,
        "ms": own,
        "ratio": base / own,
        "wanted": wanted,
    }


def parts() -> list[dict[str, Any]]:
    """Where the time of the FP8 product goes."""
    rows = []
    for inputs, outputs in SHAPES[:2]:
        x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        rows8 = quantize_rows(x)
        fp8, fp4 = pack(weight, "float8_e4m3fn"), pack(weight, "nvfp4")
        steps: dict[str, Callable[[], Any]] = {
            "quantise the input": partial(quantize_rows, x),
            "FP8 product": partial(matmul.product_of_rows, rows8, fp8.data, fp8.scale, None),
            "FP4 to FP8": partial(unpack_e4m3, fp4.data, fp4.scale, fp4.shape),
        }
        for name, run in steps.items():
            took = in_turns({name: [run] * 2})[name]
            rows.append({"part": name, "inputs": inputs, "outputs": outputs, "ms": took})
            print(f"  {name} [{TOKENS}×{inputs}→{outputs}]: {took:.4f} ms", flush=True)
    return rows


def on_the_gpu() -> list[dict[str, Any]]:
    """Bytes of a whole Wan 14B transformer of random weights, as the allocator counts them."""
    from diffusers import WanTransformer3DModel

    from sagewan.model.linear import QuantLinear
    from sagewan.pipeline.fill import empty, kept_in_float32
    from sagewan.plan.weights import POLICIES

    model = PUBLISHED["wan2.1-t2v-14b"]
    kept = kept_in_float32(WanTransformer3DModel)
    rows: list[dict[str, Any]] = []
    for format_ in (None, "float8_e4m3fn", "nvfp4"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        module = empty(lambda: WanTransformer3DModel(num_layers=model.layers))
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            dtype = torch.float32 if any(k in name.split(".") for k in kept) else torch.bfloat16
            matrix = last == "weight" and POLICIES["wan2.1"].stores(owner)
            value = torch.empty(parameter.shape, device="cuda", dtype=dtype)
            if matrix and format_:
                packed = pack(value.normal_(std=0.02), format_)
                module.set_submodule(owner, QuantLinear(packed, None, dtype))
            else:
                holder = module.get_submodule(owner)
                setattr(holder, last, torch.nn.Parameter(value, requires_grad=False))
        took = torch.cuda.memory_allocated() - before
        planned = weight_bytes(model, "bfloat16", format_)
        rows.append({"format": format_ or "bfloat16", "bytes": took, "planned": planned})
        share = took / rows[0]["bytes"]
        print(
            f"14B as {format_ or 'bfloat16'}: {took / 1e9:.2f} GB on the GPU, {share:.1%} of bf16; "
            f"the plan says {planned / 1e9:.2f} GB",
            flush=True,
        )
        del module
    assert rows[1]["bytes"] <= 0.515 * rows[0]["bytes"], "fp8 takes more than 51.5 %"
    assert rows[2]["bytes"] <= 0.30 * rows[0]["bytes"], "fp4 takes more than 30 %"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], choices=["times", "few", "bytes"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU")
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(results)
    if "times" not in arguments.skip:
        results["times"] = timings()
        results["parts"] = parts()
    if "few" not in arguments.skip:
        results["few"] = few()
    if "bytes" not in arguments.skip:
        results["bytes"] = on_the_gpu()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    timed = [*results.get("times", []), *results.get("few", [])]
    short = [r for r in timed if r["wanted"] and r["ratio"] < r["wanted"]]
    for row in short:
        print(f"below what is wanted: {row}")


if __name__ == "__main__":
    main()
