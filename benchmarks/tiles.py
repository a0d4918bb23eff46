"""Times candidate configurations of our attention kernels, to choose the ones that are frozen.

    python -m benchmarks.tiles

Kernels use fixed configurations, so that a seed means the same video on every run; this prints what
``tile_for`` of each kernel file should return on the GPU at hand. The error shows a wrong one.
"""

from types import ModuleType
from unittest import mock

import triton

from benchmarks.attention import BASELINE, MODES, error_of, inputs, milliseconds_of
from sagewan.kernels import fp8_attention, int8_attention
from sagewan.kernels.launch import Tile

SHAPE = (1, 40, 32768)
# Query rows, keys, warps, stages, and the cap on registers, if any.
INT8 = (
    (128, 64, 8, 3, None),
    (128, 64, 8, 3, 128),
    (128, 64, 8, 2, 128),
    (128, 64, 8, 4, 128),
    (128, 32, 8, 4, 128),
    (64, 64, 4, 2, 168),
    (64, 64, 4, 3, 168),
    (64, 64, 4, 2, 128),
)
FP8 = (
    (64, 128, 4, 2, None),
    (64, 128, 4, 3, None),
    (64, 128, 4, 2, 168),
    (64, 64, 4, 3, None),
    (64, 64, 4, 2, 168),
    (64, 64, 4, 3, 168),
    (128, 64, 8, 3, None),
    (128, 64, 8, 3, 128),
    (128, 128, 8, 2, None),
    (128, 128, 8, 3, None),
)
CANDIDATES: tuple[
    tuple[str, ModuleType, tuple[tuple[int, int, int, int, int | None], ...]], ...
] = (
    ("sageattn", int8_attention, INT8),
    ("sageattn_3", int8_attention, INT8),
    ("sageattn_3_fp8", fp8_attention, FP8),
)


def main() -> None:
    q, k, v = inputs("bias", SHAPE)
    baseline = milliseconds_of(MODES[BASELINE], q, k, v)
    print(f"{BASELINE}: {baseline:.2f} ms")
    for mode, module, candidates in CANDIDATES:
        for block_m, block_n, warps, stages, registers in candidates:
            tile = Tile(
                block_m=block_m, block_n=block_n, warps=warps, stages=stages, registers=registers
            )
            with mock.patch.object(module, "tile_for", return_value=tile):
                try:
                    error = error_of(MODES[mode], q, k, v)
                    milliseconds = milliseconds_of(MODES[mode], q, k, v)
                except triton.runtime.errors.OutOfResources as failure:
                    print(f"{mode:15} {tile}: {failure}", flush=True)
                    continue
            print(
                f"{mode:15} {block_m:4}x{block_n:<4} warps {warps} stages {stages} "
                f"registers {registers or '-':>3}  error {error:.5f} {milliseconds:8.2f} ms "
                f"{baseline / milliseconds:5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
