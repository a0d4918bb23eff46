"""What a model leaves when it is freed goes back to the system."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sagewan.memory.heap import give_back_heap
from sagewan.pipeline.loaded import Part

COUNT, EACH = 64, 1 << 22
ALL = COUNT * EACH

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")


def anonymous() -> int:
    """Bytes of this process that are no file's pages."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Scattered:
    """Makes modules of matrices that lie between smaller tensors, which outlive them: so the C
    library can't give back the end of its heap."""

    def __init__(self) -> None:
        self.between: list[torch.Tensor] = []

    def matrices(self) -> list[torch.Tensor]:
        # From the first time so large a piece was freed, glibc takes smaller ones from its heap.
        torch.empty(31 << 20, dtype=torch.uint8).fill_(1)
        found = []
        for _ in range(COUNT):
            found.append(torch.ones(EACH, dtype=torch.uint8))
            self.between.append(torch.ones(1 << 15))
        return found

    def module(self) -> Any:
        made = nn.Module()
        for number, matrix in enumerate(self.matrices()):
            made.register_buffer(f"w{number}", matrix)
        return made


def freed() -> None:
    """Writes what shares of matrices the process keeps: while they live, freed, and given back."""
    scattered, before = Scattered(), anonymous()
    matrices = scattered.matrices()
    shares = [anonymous() - before]
    del matrices
    shares.append(anonymous() - before)
    give_back_heap()
    shares.append(anonymous() - before)
    sys.stdout.write(" ".join(str(share / ALL) for share in shares))


@linux
def test_freed_pieces_go_back() -> None:
    # In a process of its own: what other tests have freed would lie ready for the matrices.
    command = [sys.executable, "-c", "from tests.memory.test_heap import freed; freed()"]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, cwd=root)
    live, kept, left = map(float, ran.stdout.split())
    assert live > 0.9
    assert left < 0.2
    assert kept > 0.5, "the C library gives them back on its own: then this is not needed"


@linux
def test_a_part_that_is_freed_and_what_loading_one_took_go_back() -> None:
    scattered = Scattered()

    def load() -> Any:
        module = scattered.module()
        scattered.matrices()  # what weights were quantised from
        return module

    part = Part("a", load)
    give_back_heap()
    before = anonymous()
    with part.on("cpu"):
        assert 0.9 * ALL < anonymous() - before < 1.3 * ALL
    assert anonymous() - before < 0.2 * ALL
