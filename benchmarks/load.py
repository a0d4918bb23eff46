"""Ways to bring weights from a file's pages to a GPU: one tensor after the other, by several
threads, and as a run does, through pinned buffers.

    python -m benchmarks.load [--gb 6] [--folder DIR] [--json FILE]

A safetensors file of random bytes in tensors as large as a Wan block's, just written, so that it is
in the system's page cache; each way reads it through a mapping of its own, as a new process would,
and what arrives is compared with what was written.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from sagewan.checkpoint.containers import open_file
from sagewan.checkpoint.writer import Slot, Writer
from sagewan.memory.upload import upload

SHAPE = (13824, 5120)

Bring = Callable[[Sequence[Tensor], str], list[Tensor]]


def one_by_one(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def in_threads(count: int) -> Bring:
    def bring(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda x: x.to(device, non_blocking=True), tensors))

    return bring


WAYS: dict[str, Bring] = {
    "one after the other": one_by_one,
    "2 threads": in_threads(2),
    "4 threads": in_threads(4),
    "8 threads": in_threads(8),
    "as a run": upload,
}


def make_file(path: Path, count: int) -> list[float]:
    """Random tensors; the sum of each, to know them by."""
    slots = [Slot(f"{i}.weight", torch.bfloat16, SHAPE) for i in range(count)]
    sums = []
    with Writer(path, slots, {"format": "pt"}) as writer:
        for _ in slots:
            value = torch.randn(SHAPE, device="cuda").bfloat16()
            sums.append(float(value.double().sum()))
            writer.append(value.cpu())
        writer.finish()
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="sagewan-", dir=arguments.folder))
    found = []
    try:
        path = home / "weights.safetensors"
        sums = make_file(path, max(1, round(arguments.gb * 1e9 / (SHAPE[0] * SHAPE[1] * 2))))
        size = path.stat().st_size
        for name, bring in WAYS.items():
            file = open_file(path)
            tensors = [stored.tensor() for stored in file.tensors.values()]
            torch.cuda.synchronize()
            begin = time.perf_counter()
            arrived = bring(tensors, "cuda")
            torch.cuda.synchronize()
            spent = time.perf_counter() - begin
            for one, wanted in zip(arrived, sums, strict=True):
                assert float(one.double().sum()) == wanted, f"{name}: not what was written"
            del arrived, tensors, file
            torch.cuda.empty_cache()
            found.append({"way": name, "seconds": spent, "gb_per_second": size / spent / 1e9})
            print(f"{name:22} {spent:6.2f} s, {size / spent / 1e9:6.2f} GB/s", flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if arguments.json:
        about = {"device": torch.cuda.get_device_name(), "bytes": size, "ways": found}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
