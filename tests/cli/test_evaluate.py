"""``sagewan evaluate`` from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Said

Sagewan = Callable[..., Said]


def test_a_table_is_printed(sagewan: Sagewan, tmp_path: Path) -> None:
    settings = ("--count", 2, "--steps", 1, "--cfg", 1, "--size", "64x64", "--frames", 5)
    said = sagewan(
        *("evaluate", "--model", "demo", *settings, "--emulate", "-a", "sageattn_3_fp4", "sdpa"),
        *("-o", tmp_path / "out"),
    )
    assert said.code == 0
    assert said.out.startswith("demo, 2 clips of 64×64×5, 1 step (unipc), cfg 1,")
    assert "| sageattn_3_fp4 | sageattn_3_fp4 (emulated.sageattn_3_fp4, emulated) |" in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("table.md", "table.json", "table.svg", "clips.jsonl"),
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--count", "many"), "count=many: write a whole number"),
        (("--count", "0"), "count=0: it must be at least 1"),
        (("--attention", "sageatn"), "did you mean sageattn"),
        (("--quantization", "fp3"), "quantization=fp3"),
        (("--steps", "0"), "steps=0"),
        (("--model", "nowhere"), "no such folder or file"),
        (("--prompts", "nowhere.txt"), "prompts=nowhere.txt can't be read"),
    ],
)
def test_mistakes_are_one_sentence(
    sagewan: Sagewan, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    said = sagewan("evaluate", *words, "-o", tmp_path / "out")
    assert said.code == 2
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1 + ("decide" in said.err)
    assert not (tmp_path / "out").exists()


def test_a_model_without_prompts_of_its_own_wants_a_file(
    sagewan: Sagewan, shrunken_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shrunken_folder("wan2.1-t2v-1.3b")
    said = sagewan("evaluate", "--model", folder, "-o", tmp_path / "out")
    assert said.code == 2
    assert "prompts is missing: give a text file" in said.err
