"""Unpacking GGUF's types on the GPU, beside the product that waits for it.

    python -m benchmarks.gguf [--json FILE]

Checked first: the GPU's numbers are the CPU's, bit for bit.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from sagewan.checkpoint.gguf_header import TYPES
from sagewan.checkpoint.gguf_unpack import unpack_gguf

KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
SHAPES = ((13824, 5120), (5120, 5120))
TOKENS = 32768


def milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        run()
    start.record()
    for _ in range(20):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = {name: (numbers, size) for name, numbers, size in TYPES.values()}
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {TOKENS} tokens")
    for n, k in SHAPES:
        x = torch.randn(TOKENS, k, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        product = milliseconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
        print(f"[{n}, {k}]: product in bf16 {product:.2f} ms")
        for kind in KINDS:
            numbers, size = sizes[kind]
            data = torch.randint(0, 60, (n, k // numbers * size), dtype=torch.uint8)
            on_gpu = data.cuda()
            some = unpack_gguf(on_gpu[:64], kind).cpu()
            assert torch.equal(some, unpack_gguf(data[:64], kind)), kind
            took = milliseconds(lambda d=on_gpu, kind=kind: unpack_gguf(d, kind).bfloat16())
            rows.append({"shape": [n, k], "type": kind, "ms": took, "product_ms": product})
            print(f"  {kind:5} {took:6.2f} ms, {took / product:.2f} of the product's time")
    if arguments.json:
        arguments.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
