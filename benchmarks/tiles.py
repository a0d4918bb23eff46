"""Times candidate configurations of our portable kernels, to choose the ones that are frozen.

    python -m benchmarks.tiles [--modes MODE,…] [--seconds 90] [--json FILE]

Kernels use fixed configurations, so that a seed means the same video on every run; this prints what
``tile_for`` of each kernel file should return on the GPU at hand. Each is held to float64 first.
Without preparation, which gives scales to the rows of a tile. The candidates of the modes take
turns, so that a search that is cut off by time has tried some of each.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from sagewan.attention.bench import OURS, error_of, inputs, milliseconds_of
from sagewan.kernels import fp4_attention, fp8_attention, int8_attention
from sagewan.kernels.launch import Tile, compute_capability

SHAPE = (1, 16, 16384)
# Query rows, keys, warps, stages, and the cap on registers, if any.
INT8 = (
    (128, 64, 8, 3, 128),
    (64, 64, 4, 3, 168),
    (128, 64, 8, 3, None),
    (64, 64, 4, 2, 128),
    (128, 64, 4, 3, None),
    (128, 32, 8, 4, 128),
)
FP8 = (
    (64, 128, 4, 2, None),
    (128, 128, 8, 2, None),
    (64, 64, 4, 3, 168),
    (64, 128, 4, 2, 168),
    (128, 64, 8, 3, 128),
    (128, 64, 8, 3, None),
    (64, 128, 4, 3, None),
    (128, 128, 8, 3, None),
)
FP4 = (
    (128, 64, 8, 3, None),
    (128, 128, 8, 2, None),
    (128, 64, 4, 3, None),
    (64, 128, 4, 3, None),
    (128, 128, 4, 2, None),
    (128, 64, 8, 4, None),
)
CANDIDATES: dict[str, tuple[ModuleType, tuple[tuple[int, int, int, int, int | None], ...]]] = {
    "sageattn": (int8_attention, INT8),
    "sageattn_3": (int8_attention, INT8),
    "sageattn_3_fp8": (fp8_attention, FP8),
    "sageattn_3_fp4": (fp4_attention, FP4),
}


def turns(modes: list[str], sm: int) -> Iterator[tuple[str, Tile]]:
    """The candidates of all modes, one of each in turn."""
    lists = [[(mode, numbers) for numbers in CANDIDATES[mode][1]] for mode in modes]
    for round_ in itertools.zip_longest(*lists):
        for mode, (m, n, warps, stages, registers) in filter(None, round_):
            cut = Tile(block_m=m, block_n=n, warps=warps, stages=stages, registers=registers)
            yield mode, replace(cut, tma=sm == 90)


def measured(mode: str, tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
    """The error and the milliseconds of one candidate."""
    module = CANDIDATES[mode][0]
    prepare: Callable[..., Any] = getattr(module, f"prepare_{mode}")
    with mock.patch.object(module, "tile_for", return_value=tile):
        prepared = prepare(q, k, v)

        def attend(*_: Tensor) -> Tensor:
            out: Tensor = module.attend(prepared)
            return out

        return error_of(attend, q, k, v), milliseconds_of(attend, q, k, v)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sm = compute_capability(torch.device("cuda"))
    usual = [mode for mode in CANDIDATES if sm >= 100 or mode != "sageattn_3_fp4"]
    parser.add_argument("--modes", default=",".join(usual))
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    q, k, v = inputs("bias", SHAPE, "cuda")
    found = []
    for mode, tile in turns(arguments.modes.split(","), sm):
        if time.monotonic() > end:
            print("time is up")
            break
        try:
            error, milliseconds = measured(mode, tile, q, k, v)
        except (triton.runtime.errors.OutOfResources, RuntimeError) as failure:
            print(f"{mode:15} {tile}: {str(failure).splitlines()[0]}", flush=True)
            continue
        right = error <= OURS[mode][0]
        found.append({"mode": mode, **asdict(tile), "error": error, "milliseconds": milliseconds})
        print(
            f"{mode:15} {tile.block_m:4}x{tile.block_n:<4} warps {tile.warps} stages {tile.stages}"
            f" registers {tile.registers or '-':>3}  error {error:.5f} {milliseconds:7.3f} ms"
            f"{'' if right else '  WRONG'}",
            flush=True,
        )
    for mode in dict.fromkeys(str(one["mode"]) for one in found):
        best = min((x for x in found if x["mode"] == mode), key=lambda x: float(x["milliseconds"]))
        print("best:", best)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
