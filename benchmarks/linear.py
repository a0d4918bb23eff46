"""Quantised linear layers on one GPU: correct first, then times against bf16, bytes, conversion.

    python -m benchmarks.linear [--json FILE] [--checkpoint-gb 28] [--skip times|bytes|checkpoint]

Times are medians of CUDA events after a warm-up, everything between the bf16 input and the bf16
output included. One row is timed as a captured graph: so small a layer's time is else that of the
Python which starts it.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
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
THIN = {"fp8_scaled": "float8_e4m3fn", "fp4_scaled": "nvfp4"}
# What is promised, against bf16 in the same run.
WANTED = {("fp8_scaled", TOKENS): 1.6, ("fp4_scaled", TOKENS): 1.5}


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """The median of single runs, after three that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def captured(run: Callable[[], Any], count: int = 20) -> Callable[[], None]:
    """A graph of ``count`` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    return graph.replay


def assert_correct(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor, limit: float) -> float:
    """Against float64 on a sample of rows."""
    rows = torch.linspace(0, x.shape[0] - 1, min(64, x.shape[0]), device=x.device).long()
    exact = F.linear(x[rows].double(), weight.double(), bias.double())
    error = float((found[rows].double() - exact).norm() / exact.norm())
    assert error < limit, f"error {error:.3g}, and the limit is {limit}"
    return error


def timings() -> list[dict[str, Any]]:
    rows = []
    for inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
        bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16)
        for tokens in (TOKENS, 1):
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            rows += _of_shape(x, weight, bias)
        del weight
        torch.cuda.empty_cache()
    return rows


def _of_shape(x: Tensor, weight: Tensor, bias: Tensor) -> list[dict[str, Any]]:
    tokens = x.shape[0]
    outputs, inputs = weight.shape

    def timed(run: Callable[[], Any]) -> float:
        return milliseconds(run) if tokens > 1 else milliseconds(captured(run)) / 20

    base = timed(lambda: F.linear(x, weight, bias))
    ways = WAYS if tokens > 1 else {k: (f, matmul.thin, 0.01) for k, f in THIN.items()}
    rows = []
    for name, (format_, function, limit) in ways.items():
        packed = pack(weight, format_)
        stored = unpack(packed, torch.float32)
        error = assert_correct(function(x, packed, bias), x, stored, bias, limit)
        del stored
        own = timed(partial(function, x, packed, bias))
        wanted = WANTED.get((name, tokens)) if tokens > 1 else 1.0
        if inputs == 13824:
            wanted = None
        rows.append(
            {
                "tokens": tokens,
                "inputs": inputs,
                "outputs": outputs,
                "way": name,
                "implementation": function.__name__,
                "bf16_ms": base,
                "ms": own,
                "ratio": base / own,
                "wanted": wanted,
                "error": error,
            }
        )
        print(
            f"[{tokens}×{inputs}→{outputs}] {name:24} {own:8.4f} ms, bf16 {base:8.4f} ms: "
            f"{base / own:5.2f}×{'' if wanted is None else f' (wanted {wanted})'}, "
            f"error {error:.4f}",
            flush=True,
        )
    return rows


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
            took = milliseconds(run)
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


class _Peak:
    """The most host memory that is this process's own (not a file's pages) while a block runs."""

    def __enter__(self) -> "_Peak":
        self.before = self.most = _own_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, _own_memory())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, _own_memory())


def _own_memory() -> int:
    """Bytes of anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Shards of a transformer in bf16 with Wan 14B's widths, of as many blocks as that takes; the
    bytes. Blocks share their numbers: only the first is drawn, on the GPU."""
    from sagewan.plan.layers import block_layers

    model = PUBLISHED["wan2.1-t2v-14b"]
    width = model.heads * model.head_dim
    layers = block_layers(model)
    each = sum(layer.outputs * layer.inputs for layer in layers) * 2
    blocks = max(1, round(gigabytes * 1e9 / each))
    numbers = {
        layer.name: (torch.randn(layer.shape, device="cuda") * 0.02).bfloat16().cpu()
        for layer in layers
    }
    small = {
        **{f"{layer.name}.bias": torch.zeros(layer.outputs).bfloat16() for layer in layers},
        **{f"attn{a}.norm_{n}.weight": torch.ones(width).bfloat16() for a in (1, 2) for n in "qk"},
        "norm2.weight": torch.ones(width),
        "norm2.bias": torch.zeros(width),
        "scale_shift_table": torch.zeros(1, 6, width),
    }
    per_shard = max(1, round(5e9 / each))
    places: dict[str, str] = {}
    total = 0
    for first in range(0, blocks, per_shard):
        tensors = {}
        for block in range(first, min(first + per_shard, blocks)):
            tensors |= {f"blocks.{block}.{k}.weight": x for k, x in numbers.items()}
            tensors |= {f"blocks.{block}.{k}": x for k, x in small.items()}
        name = f"diffusion_pytorch_model-{first:05}.safetensors"
        _save(folder / name, tensors)
        places |= dict.fromkeys(tensors, name)
        total += (folder / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from sagewan.checkpoint.writer import Slot, Writer

    slots = [Slot(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
    with Writer(path, slots, {"format": "pt"}) as writer:
        for tensor in tensors.values():
            writer.append(tensor)
        writer.finish()


def checkpoint(gigabytes: float, folder: Path | None) -> list[dict[str, Any]]:
    """Seconds and host memory to quantise a checkpoint of this size, read back and compared."""
    from sagewan.checkpoint.convert import Conversion, convert
    from sagewan.checkpoint.roles import TRANSFORMER
    from sagewan.checkpoint.source import open_source

    home = Path(tempfile.mkdtemp(prefix="sagewan-", dir=folder))
    rows = []
    try:
        start = time.perf_counter()
        (home / "source").mkdir()
        size = make_checkpoint(home / "source", gigabytes)
        print(f"made {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        source = open_source(home / "source", TRANSFORMER)
        for to in ("fp8_scaled", "fp4_scaled"):
            conversion = Conversion(to=to, layout="diffusers", device="cuda:0")
            with _Peak() as peak:
                start = time.perf_counter()
                written = convert(source, home / to, conversion, lambda *_: None)
                took = time.perf_counter() - start
            grown = peak.most - peak.before
            rows.append({"to": to, "source_bytes": size, "bytes": written.bytes,
                         "seconds": took, "host_bytes": grown})  # fmt: skip
            print(
                f"{to}: {size / 1e9:.1f} GB → {written.bytes / 1e9:.1f} GB in {took:.1f} s, read "
                f"back and compared; host memory grew by {grown / 1e9:.2f} GB; "
                f"worst layer {written.worst(1)[0][1]:.4f}",
                flush=True,
            )
            shutil.rmtree(home / to)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checkpoint-gb", type=float, default=28.0)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made (a temporary one)"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=["times", "bytes", "checkpoint"])
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
    if "bytes" not in arguments.skip:
        results["bytes"] = on_the_gpu()
    if "checkpoint" not in arguments.skip:
        results["checkpoint"] = checkpoint(arguments.checkpoint_gb, arguments.folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    short = [r for r in results.get("times", []) if r["wanted"] and r["ratio"] < r["wanted"]]
    for row in short:
        print(f"below what is wanted: {row}")


if __name__ == "__main__":
    main()
