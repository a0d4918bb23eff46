"""``sagewan bench attention``: on a CPU the same as on a GPU, with fewer contestants."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sagewan.attention import bench, peak
from tests.cli.conftest import Said

SMALL = ("--device", "cpu", "--shapes", "1x2x96,1x1x70")


def test_modes_are_measured_and_written(sagewan: Callable[..., Said], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    said = sagewan(
        "bench", "attention", *SMALL, "--modes", "sageattn,sageattn_3_fp8", "--emulate",
        "--json", path,
    )  # fmt: skip
    assert said.code == 0, said.err
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {one["name"] for one in report["results"]} == {
        "torch.sdpa",
        "emulated.sageattn",
        "emulated.sageattn_3_fp8",
    }
    assert len(report["results"]) == 3 * 2 * 2
    for one in report["results"]:
        assert 0 < one["error"] < 0.06
        assert one["wrong"] is None
        assert (one["ratio"] == 1) == (one["name"] == "torch.sdpa")
        assert one["name"] in said.out
    assert report["date"]
    assert report["packages"]["torch"]
    assert "needs an NVIDIA GPU" in report["left_out"]["sagewan.sageattn"]
    assert "sagewan.sageattn is left out" in said.err


def test_what_leaves_out_blocks_is_held_to_the_rest_and_to_its_own_speed(
    sagewan: Callable[..., Said], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    said = sagewan(
        *("bench", "attention", "--device", "cpu", "--shapes", "1x2x1000", "--emulate"),
        *("--modes", "sageattn", "--sparsity", "0.5", "0.75", "--json", path),
    )
    assert said.code == 0, said.err
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    sparse = [one for one in results if one["sparsity"]]
    assert [one["name"] for one in sparse] == ["emulated.sageattn"] * 4
    assert [one["sparsity"] for one in sparse] == [0.5, 0.75] * 2
    for one in sparse:
        assert 0 < one["error"] < 0.06
        assert one["of_dense"] > 0
    assert "emulated.sageattn −75%" in said.out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--sparsity", "75"), "share between 0 and 1"),
        (("--sparsity", "nan"), "sparsity=nan"),
        (("--modes", "sageattn_9"), "sageattn_9"),
        (("--shapes", "40x1024"), "BATCHxHEADSxTOKENS"),
        (("--shapes", "1x0x1024"), "BATCHxHEADSxTOKENS"),
        (("--families", "easy"), "easy"),
    ],
)
def test_what_it_does_not_take_is_refused(
    sagewan: Callable[..., Said], words: tuple[str, ...], why: str
) -> None:
    said = sagewan("bench", "attention", *words)
    assert said.code == 2
    assert why in said.err


def test_one_that_is_wrong_or_fails_is_not_timed(
    sagewan: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such kernel")

    def chosen(*_: object, **__: object) -> object:
        limits = (0.01, 0.01)
        torch_row = bench._of_row(next(row for row in bench.ROWS if row.name == bench.BASELINE))
        names = {"sagewan.wrong": lambda q, k, v: 1.1 * torch_row.attend(q, k, v), "rival": broken}
        others = [
            bench.Contestant(name=name, mode="sdpa", attend=call, bits=(16, 16), limits=limits)
            for name, call in names.items()
        ]
        return [torch_row, *others], {}

    monkeypatch.setattr(bench, "contestants", chosen)
    said = sagewan("bench", "attention", *SMALL)
    assert said.code == 4
    assert "not timed: error above 0.01" in said.out
    assert "not timed: ValueError: no such kernel" in said.out


def test_the_peak_is_of_matrix_units_and_exponentials_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    class Hopper:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Hopper)
    device = torch.device("cuda")
    found = [peak.tflops(90, device, bits, 1830) for bits in ((16, 16), (8, 16), (8, 8))]
    assert found == pytest.approx([989, 1319, 1979], rel=0.001)
    assert peak.tflops(89, device, (8, 8), 1830) is None
    assert peak.tflops(90, device, (8, 8), None) is None


def test_figures_that_can_not_be_written_are_refused_before_measuring(
    sagewan: Callable[..., Said], tmp_path: Path
) -> None:
    path = tmp_path / "absent" / "figures.json"
    said = sagewan("bench", "attention", *SMALL, "--json", path)
    assert said.code == 2
    assert "does not exist; create it" in said.err
    assert said.out == ""
