"""A checkpoint of Wan 14B's size quantised on one GPU: seconds, bytes a second, host memory.

    python -m benchmarks.convert [--json FILE] [--gb 28] [--to fp4_scaled] [--folder DIR] [--cached]

The shards are taken out of the page cache before each conversion, unless ``--cached``; whether the
disk below keeps them in a cache of its own can't be told from here.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagewan.checkpoint.convert import Conversion, convert
from sagewan.checkpoint.roles import TRANSFORMER
from sagewan.checkpoint.source import open_source
from sagewan.checkpoint.writer import Slot, Writer
from sagewan.plan.layers import block_layers
from sagewan.plan.models import PUBLISHED


class _Peak:
    """The most host memory of this process while a block runs: its own, and all of it, with the
    pages of files that it has mapped."""

    def __enter__(self) -> "_Peak":
        self.before = _memory()
        self._most = self.before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._look()

    def _look(self) -> None:
        self._most = {name: max(most, _memory()[name]) for name, most in self._most.items()}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def grown(self) -> dict[str, int]:
        return {name: most - self.before[name] for name, most in self._most.items()}


def _memory() -> dict[str, int]:
    """Bytes: ``own`` is not backed by a file, ``all`` is resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {k: int(v.split()[0]) * 1024 for k, v in (x.split(":") for x in lines if "kB" in x)}
    return {"own": found["RssAnon"] + found["RssShmem"], "all": found["VmRSS"]}


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Shards of a transformer in bf16 with Wan 14B's widths, of as many blocks as that takes; the
    bytes. Blocks share their numbers: only the first is drawn, on the GPU if there is one."""
    model = PUBLISHED["wan2.1-t2v-14b"]
    width = model.heads * model.head_dim
    layers = block_layers(model)
    each = sum(layer.outputs * layer.inputs for layer in layers) * 2
    blocks = max(1, round(gigabytes * 1e9 / each))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = {
        layer.name: (torch.randn(layer.shape, device=device) * 0.02).bfloat16().cpu()
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
    slots = [Slot(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()]
    with Writer(path, slots, {"format": "pt"}) as writer:
        for tensor in tensors.values():
            writer.append(tensor)
        writer.finish()


def timed(source: Path, target: Path, to: str, *, cached: bool) -> dict[str, Any]:
    """Seconds and host memory to quantise a checkpoint, what was written read back and compared."""
    if not cached:
        forget(source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    marks = [time.perf_counter()]

    def told(done: int, total: int) -> None:
        if done == total and len(marks) == 1:
            marks.append(time.perf_counter())

    with _Peak() as peak:
        conversion = Conversion(to=to, layout="diffusers", device=device)
        written = convert(open_source(source, TRANSFORMER), target, conversion, told)
        marks.append(time.perf_counter())
    start, made, end = marks
    row = {
        "to": to,
        "cached": cached,
        "source_bytes": size,
        "bytes": written.bytes,
        "seconds": end - start,
        "written_seconds": made - start,
        "host_bytes": peak.grown,
        "worst": written.worst(1)[0][1],
    }
    print(
        f"{to}: {size / 1e9:.1f} GB {'in' if cached else 'not in'} the page cache → "
        f"{written.bytes / 1e9:.1f} GB in {end - start:.1f} s: {made - start:.1f} s to write "
        f"({size / (made - start) / 1e9:.2f} GB/s read, "
        f"{written.bytes / (made - start) / 1e9:.2f} GB/s written), {end - made:.1f} s to read "
        f"back and compare; host memory grew by {peak.grown['own'] / 1e9:.2f} GB, with mapped "
        f"files {peak.grown['all'] / 1e9:.2f} GB; worst layer {row['worst']:.4f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gb", type=float, default=28.0)
    parser.add_argument("--to", nargs="+", default=["fp8_scaled", "fp4_scaled"])
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made (a temporary one)"
    )
    parser.add_argument("--cached", action="store_true", help="leave it in the page cache")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    home = Path(tempfile.mkdtemp(prefix="sagewan-", dir=arguments.folder))
    rows = []
    try:
        start = time.perf_counter()
        (home / "source").mkdir()
        size = make_checkpoint(home / "source", arguments.gb)
        print(f"made {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        for to in arguments.to:
            rows.append(timed(home / "source", home / to, to, cached=arguments.cached))
            shutil.rmtree(home / to)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
