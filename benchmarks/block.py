"""One block of Wan 14B on one GPU, random weights: correct first, then times, ratios and kernels.

    python -m benchmarks.block [--tokens 32760 75600] [--repeats 5] [--json FILE]

Each way is compared with diffusers' block in float32 on a short sequence before it is timed. Times
are medians of CUDA events, one after the other in one run; a profile of each tells what share is
neither attention nor a matrix product.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagewan.attention.launch import Launcher
from sagewan.checkpoint.quantize import pack
from sagewan.model import matmul
from sagewan.model.attention import Attention, Turn
from sagewan.model.block import Block
from sagewan.model.blocks import Passes
from sagewan.model.fused import FusedBlock, HopperBlock
from sagewan.model.linear import QuantLinear
from sagewan.model.times import Modulation
from sagewan.plan.attention import AttentionPlan, Choice
from sagewan.plan.blocks import BLOCK_ROWS
from sagewan.plan.catalogue import Problem, row_named

HEADS, HEAD_DIM, FFN, TEXT = 40, 128, 13824, 512
WIDTH = HEADS * HEAD_DIM
FLOPS = {
    "product": lambda n: 2 * n * WIDTH * (6 * WIDTH + 2 * FFN),
    "attention": lambda n: 4 * n * n * WIDTH,
}
# The most that each way's change of the hidden state may differ from float32's.
LIMITS = {"bf16": 0.02, "fp8": 0.08, "fp8 added": 0.08, "fp8 through": 0.08}
_ATTENTION = ("attention", "flash", "fmha", "sdpa", "cudnn_generated", "softmax")
_PRODUCT = ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk", "dot_kernel", "product")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the block runs. ``mode`` is a row of attention's; None is diffusers' own forward.
    ``apart``: Q and K are normalised and turned before they are prepared. ``weights`` "fp8 added":
    products add themselves to the residual; "fp8 through": so does that after GELU, which the one
    before it writes."""

    name: str
    weights: str
    mode: str | None = None
    fused: bool = False
    chunk: int | None = None
    heads: int | None = None
    apart: bool = False


FP8 = "sagewan.sageattn_3_fp8_hopper"
WAYS = (
    Way(name="diffusers eager", weights="bf16"),
    Way(name="block bf16 sdpa", weights="bf16", mode="torch.sdpa"),
    Way(name="fused bf16 sdpa", weights="bf16", mode="torch.sdpa", fused=True),
    Way(name="block fp8", weights="fp8", mode=FP8),
    Way(name="block fp8 2048x8", weights="fp8", mode=FP8, chunk=2048, heads=8),
    Way(name="fused fp8 2048x8", weights="fp8", mode=FP8, fused=True, chunk=2048, heads=8),
    Way(name="fused fp8 4096x8", weights="fp8", mode=FP8, fused=True, chunk=4096, heads=8),
    Way(name="fused fp8 by 4096", weights="fp8 added", mode=FP8, fused=True, chunk=4096),
    Way(name="fused fp8 by 8192", weights="fp8 added", mode=FP8, fused=True, chunk=8192),
    Way(name="fused fp8, Q, K apart", weights="fp8", mode=FP8, fused=True, chunk=16384, apart=True),
    Way(name="fused fp8, sums apart", weights="fp8", mode=FP8, fused=True, chunk=16384),
    Way(name="fused fp8, GELU apart", weights="fp8 added", mode=FP8, fused=True, chunk=16384),
    Way(name="fused fp8 16384", weights="fp8 through", mode=FP8, fused=True, chunk=16384),
    Way(name="fused fp8", weights="fp8", mode=FP8, fused=True),
)


def make_block() -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    torch.manual_seed(0)
    with torch.device("cuda"):
        block = WanTransformerBlock(WIDTH, FFN, HEADS, cross_attn_norm=True)
        for name, parameter in block.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                nn.init.normal_(parameter, 1.0, 0.1)
            elif not name.endswith("table"):
                nn.init.normal_(parameter, std=0.1)
    for name, parameter in block.named_parameters():
        if not (name.startswith("norm") or name.endswith("table")):
            parameter.data = parameter.data.bfloat16()
    return block.eval().requires_grad_(False)


def quantised(block: Any, *, adds: bool, through: bool = False) -> Any:
    import copy

    other = copy.deepcopy(block)
    for name, module in list(other.named_modules()):
        if isinstance(module, nn.Linear):
            layer = QuantLinear(pack(module.weight, "float8_e4m3fn"), module.bias, torch.bfloat16)
            if name not in ("attn2.to_k", "attn2.to_v"):
                layer.multiply, layer.multiplies_fp8 = matmul.fp8_rows, True
                layer.multiply_add = matmul.add_fp8_rows if adds else None
                layer.multiply_gelu = matmul.gelu_fp8_rows if through else None
            other.set_submodule(name, layer)
    return other


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    text: Tensor
    times: Tensor  # [1, 6, W]
    rotary: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, tokens: int) -> "Inputs":
        generator = torch.Generator("cuda").manual_seed(tokens)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        angles = 3 * noise(1, tokens, 1, HEAD_DIM // 2)
        cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
        hidden, text = noise(1, tokens, WIDTH).bfloat16(), noise(1, TEXT, WIDTH).bfloat16()
        return cls(hidden, text, 0.3 * noise(1, 6, WIDTH), (cos, sin))


def runner(way: Way, blocks: dict[str, Any], inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """A function of the hidden state; ours change it in place."""
    block = blocks[way.weights]
    if way.mode is None:
        return lambda hidden: block(
            hidden, inputs.text, inputs.times.to(hidden.dtype), inputs.rotary
        )
    attention = Attention(Launcher())
    chosen = Choice("", row_named(way.mode))
    plan = AttentionPlan(
        requested="", problem=Problem(head_dim=HEAD_DIM, dtype="bfloat16"), main=chosen
    )
    # The text's keys and values are a run's, not a step's.
    turn = Turn(plan, 1, lambda: None, chunk=way.chunk, heads=way.heads, known={})
    forward: Any = Block(block, attention, 0)
    if way.fused:
        hopper = BLOCK_ROWS[0].prepares == way.mode and not way.apart
        row, kind = (BLOCK_ROWS[0], HopperBlock) if hopper else (BLOCK_ROWS[1], FusedBlock)
        forward = kind(block, attention, 0, Passes(row, "fused", Counter()))

    def run(hidden: Tensor) -> Tensor:
        times = Modulation(inputs.times.to(hidden.dtype).unsqueeze(1), (0, hidden.shape[1]))
        with attention.during(turn):
            out: Tensor = forward(hidden, inputs.text, times, inputs.rotary)
        return out

    return run


def check(way: Way, blocks: dict[str, Any]) -> float:
    inputs = Inputs.of(1560)
    exact = replace(inputs, hidden=inputs.hidden.float(), text=inputs.text.float())
    expected = runner(Way(name="", weights="float32"), blocks, exact)(exact.hidden)
    found = runner(way, blocks, inputs)(inputs.hidden.clone()).float()
    change = expected - exact.hidden
    error = float((found - expected).norm() / change.norm())
    assert error < LIMITS[way.weights], f"{way.name}: {error:.4f}"
    return error


def milliseconds(run: Callable[[Tensor], Tensor], hidden: Tensor, repeats: int) -> float:
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        given = hidden.clone()
        start.record()
        run(given)
        end.record()
        end.synchronize()
        if repeat > 1:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    if "int8_rows" in name or "e4m3_columns" in name or "reduce_kernel" in name:
        return "other"
    if any(word in name for word in _PRODUCT):
        return "product"
    return "attention" if any(word in name for word in _ATTENTION) else "other"


def profile(run: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds of each kernel, and how often it ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    given = hidden.clone()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        run(given)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiled.key_averages():
        times[event.key] += event.self_device_time_total / 1000
        counts[event.key] += event.count
    return times, counts


def measure(way: Way, blocks: dict[str, Any], inputs: Inputs, repeats: int) -> dict[str, Any]:
    run = runner(way, blocks, inputs)
    torch.cuda.empty_cache()
    run(inputs.hidden.clone())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(run, inputs.hidden, repeats)
    peak = torch.cuda.max_memory_allocated() - before
    times, counts = profile(run, inputs.hidden)
    shares: Counter[str] = Counter()
    for name, spent in times.items():
        shares[kind_of(name)] += spent
    return {
        "way": way.name,
        "tokens": inputs.hidden.shape[1],
        "ms": took,
        "peak_gib": peak / 2**30,
        "shares": dict(shares),
        "kernels": [[name, ms, counts[name]] for name, ms in times.most_common(24)],
    }


def show(row: dict[str, Any], base: float, error: float) -> None:
    shares, tokens = row["shares"], row["tokens"]
    rates = {
        kind: FLOPS[kind](tokens) / shares[kind] / 1e9 if shares.get(kind) else 0 for kind in FLOPS
    }
    whole = sum(shares.values())
    print(
        f"{tokens:6} {row['way']:18} {row['ms']:8.2f} ms {base / row['ms']:5.2f}x  products "
        f"{shares.get('product', 0):7.2f} ({rates['product']:5.0f} TFLOPS) attention "
        f"{shares.get('attention', 0):7.2f} ({rates['attention']:4.0f}) other "
        f"{shares.get('other', 0):6.2f} = {shares.get('other', 0) / whole:5.1%}  "
        f"{row['peak_gib']:5.2f} GiB  error {error:.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32760, 75600])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="*", help="only those whose name has one of these words")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs an NVIDIA GPU")
    plain = make_block()
    import copy

    blocks = {
        "bf16": plain,
        "fp8": quantised(plain, adds=False),
        "fp8 added": quantised(plain, adds=True),
        "fp8 through": quantised(plain, adds=True, through=True),
        "float32": copy.deepcopy(plain).float(),
    }
    print(torch.cuda.get_device_name(), torch.__version__, time.strftime("%Y-%m-%d"))
    ways = [w for w in WAYS if not arguments.ways or any(x in w.name for x in arguments.ways)]
    rows = []
    with torch.inference_mode():
        errors = {way.name: check(way, blocks) for way in ways}
        del blocks["float32"]
        for tokens in arguments.tokens:
            inputs, base = Inputs.of(tokens), 0.0
            for way in ways:
                row = measure(way, blocks, inputs, arguments.repeats)
                base = base or row["ms"]
                rows.append({**row, "error": errors[way.name], "ratio": base / row["ms"]})
                show(row, base, errors[way.name])
            for name, ms, count in rows[-1]["kernels"]:
                print(f"    {ms:8.3f} ms {count:4}x {name[:110]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
