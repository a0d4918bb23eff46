"""The forward pass of a run's blocks: the one that ran is told, and gives way if it fails."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sagewan.model.attention import Attention
from sagewan.model.block import Block
from sagewan.model.block_self_test import self_test_block
from sagewan.model.blocks import Passes
from sagewan.pipeline import generate
from sagewan.plan import blocks
from sagewan.plan.catalogue import Problem
from tests.machines import CPU
from tests.pipeline.test_session import request

Folder = Callable[[str], Path]
PLAIN = blocks.BLOCK_ROWS[-1]


def norm(hidden: Tensor) -> None:
    """As a kernel."""


class Made:
    """Right in its self-test, whose sequence is short."""

    most = 70

    def __init__(self, block: Any, attention: Attention, layer: int, passes: Passes) -> None:
        self._block, self._passes = Block(block, attention, layer), passes

    def __call__(self, hidden: Tensor, *others: Any) -> Tensor:
        def failing(hidden: Tensor) -> None:
            if hidden.shape[1] > self.most:
                raise RuntimeError("Triton Error [CUDA]: invalid argument")

        self._passes.run(failing, hidden)
        self._passes.run(norm, hidden)
        return self._block(hidden, *others)


class Wrong(Made):
    most = 10**9

    def __call__(self, hidden: Tensor, *others: Any) -> Tensor:
        return 1.1 * super().__call__(hidden, *others)


class Right(Made):
    most = 10**9


def put_first(monkeypatch: pytest.MonkeyPatch, kind: type[Made]) -> blocks.BlockRow:
    row = replace(
        PLAIN, name="made.up", call=f"{__name__}:{kind.__name__}", fused=True, trusted=False
    )
    monkeypatch.setattr(blocks, "BLOCK_ROWS", (row, PLAIN))
    return row


def test_the_report_tells_what_ran_and_why_it_is_not_fused(
    shrunken_folder: Folder, tmp_path: Path
) -> None:
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    report = generate(request(folder, tmp_path / "x.mp4")).report
    (ran,) = report["blocks"]["ran"]
    assert ran["implementation"] == "sagewan.block"
    assert ran["calls"] == sum(row["calls"] for row in report["attention"]["ran"])
    assert "needs an NVIDIA GPU" in report["blocks"]["why_not_fused"]
    assert report["plan"]["blocks"]["implementation"] == "sagewan.block"


def test_kernels_are_counted_by_their_functions(
    shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_first(monkeypatch, Right)
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    report = generate(request(folder, tmp_path / "x.mp4")).report
    (ran,) = report["blocks"]["ran"]
    assert ran["implementation"] == "made.up"
    assert ran["kernels"] == {"failing": ran["calls"], "norm": ran["calls"]}
    assert report["blocks"]["why_not_fused"] is None


def test_one_that_fails_in_use_gives_way_and_that_is_said(
    shrunken_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_first(monkeypatch, Made)
    monkeypatch.setattr(Made, "most", 70)
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    wanted = request(folder, tmp_path / "x.mp4", size=(160, 160), frames=9)
    report = generate(wanted).report
    (ran,) = report["blocks"]["ran"]
    assert (ran["implementation"], ran["kernels"]) == ("sagewan.block", {})
    (change,) = report["blocks"]["fallbacks"]
    assert (change["from"], change["to"]) == ("made.up", "sagewan.block")
    assert "invalid argument" in change["why"]
    assert report["attention"]["fallbacks"] == report["weights"]["fallbacks"] == []


def test_the_self_test_sees_a_wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(head_dim=64, dtype="float32")
    passed = self_test_block(PLAIN, CPU, problem)
    assert passed.passed
    assert passed.error is not None
    assert passed.error < 1e-5
    failed = self_test_block(put_first(monkeypatch, Wrong), CPU, problem)
    assert failed.objection is not None
    assert failed.objection.code == "self-test-error"
    monkeypatch.setattr(Wrong, "most", 1)
    broken = self_test_block(put_first(monkeypatch, Wrong), CPU, problem)
    assert broken.objection is not None
    assert "invalid argument" in broken.objection.sentence()


def test_the_plain_block_passes_in_16_bit() -> None:
    test = self_test_block(PLAIN, CPU, Problem(head_dim=64, dtype="bfloat16"))
    assert test.passed, test
    assert torch.tensor(test.error) > 1e-3
