"""Quantised weights whose product fails in use, or after which the latents are not finite."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sagewan.errors import UnsupportedError
from sagewan.evaluate.run import Evaluation, evaluate
from sagewan.model.matmul import unpacked
from sagewan.pipeline import generate
from sagewan.pipeline.recover import rejected
from sagewan.plan import linear
from sagewan.plan.evidence import Evidence
from sagewan.plan.plan import make_plan
from sagewan.plan.request import Request
from tests.machines import WAN_14B, machine
from tests.pipeline.test_session import request

Product = Callable[[Tensor, object, Tensor | None], Tensor]
TESTED_ROWS = 300


def breaking(x: Tensor, packed: object, bias: Tensor | None) -> Tensor:
    """Right in its self-test; a kernel that is refused with other sizes."""
    if x.shape[0] != TESTED_ROWS:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")
    return unpacked(x, packed, bias)  # type: ignore[arg-type]


def no_memory(x: Tensor, packed: object, bias: Tensor | None) -> Tensor:
    if x.shape[0] != TESTED_ROWS:
        raise RuntimeError("Triton Error [CUDA]: out of memory")
    return unpacked(x, packed, bias)  # type: ignore[arg-type]


@pytest.fixture
def first_row(monkeypatch: pytest.MonkeyPatch) -> Callable[[Product], None]:
    """Put a function first among the products with FP8 weights."""

    def put(function: Product) -> None:
        model = next(row for row in linear.LINEAR_ROWS if row.name == "emulated.fp8")
        call = f"{__name__}:{function.__name__}"
        row = replace(model, name="made.up", call=call, emulated=False, trusted=False)
        monkeypatch.setattr(linear, "LINEAR_ROWS", (row, *linear.LINEAR_ROWS))

    return put


def test_a_product_that_fails_in_use_gives_way_and_that_is_said(
    first_row: Callable[[Product], None], shrunken_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    first_row(breaking)
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    wanted = request(folder, tmp_path / "x.mp4", quantization="fp8_scaled")
    report = generate(wanted).report
    assert {row["implementation"] for row in report["weights"]["compute"]} == {"torch.unpacked"}
    (change,) = report["weights"]["fallbacks"]
    assert (change["from"], change["to"]) == ("made.up", "torch.unpacked")
    assert "invalid argument" in change["why"]
    assert report["attention"]["fallbacks"] == []
    plain = generate(request(folder, tmp_path / "y.mp4")).report
    assert report["attention"]["ran"] == plain["attention"]["ran"]


def test_an_evaluation_goes_on_without_it(
    first_row: Callable[[Product], None], tmp_path: Path
) -> None:
    first_row(breaking)
    small = Request(prompt="evaluate", size=(64, 64), frames=5, steps=2, seed=3)
    evaluation = Evaluation(
        request=small, attention=("sdpa",), quantization=("fp8_scaled",), folder=tmp_path, count=1
    )
    table = evaluate(evaluation).table
    assert "made.up gave way to torch.unpacked: it failed while running" in table


def test_memory_that_runs_out_in_a_product_is_told_as_that(
    first_row: Callable[[Product], None], shrunken_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    first_row(no_memory)
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    with pytest.raises(UnsupportedError, match="ran out of memory"):
        generate(request(folder, tmp_path / "x.mp4", quantization="fp8_scaled"))


def test_the_way_to_multiply_is_named_with_the_way_out() -> None:
    failure = SimpleNamespace(step=2, snapshot=SimpleNamespace(latents=torch.zeros(1)))

    def said(quantization: str) -> str:
        request = Request(prompt="a cat", quantization=quantization, attention="sdpa")
        hardware = machine("H100", triton="3.6")
        plan = make_plan(request, WAN_14B, hardware, Evidence())
        return str(rejected(plan, failure))  # type: ignore[arg-type]

    assert "multiplied as fp8 e4m3 × fp8 e4m3; try" in said("fp8_scaled")
    assert said("fp8_scaled").endswith("--quantization none")
    assert said("none").endswith("--dtype float32")
