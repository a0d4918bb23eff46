"""``sagewan doctor`` as a user meets it, with broken packages installed beside it."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagewan.cli import doctor
from sagewan.errors import RequestError
from sagewan.plan import catalogue
from sagewan.plan.catalogue import Implementation
from tests import fakes

SDPA = catalogue.row_named("torch.sdpa")
FLASH = fakes.on_cpu("flash_attn", layout="BHND")
SAGE = fakes.on_cpu("sageattention.sageattn_1", key_block=1)
SAGE_3 = fakes.on_cpu("sageattn3.blackwell", options={})


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path, rows that run on a CPU, and a cache that is empty."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "ROWS", (SDPA, FLASH, SAGE, SAGE_3))
    yield folder
    for name in ("flash_attn", "sageattention", "sageattn3"):
        sys.modules.pop(name, None)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(argv))


def examine(
    packages: Path, capsys: pytest.CaptureFixture[str], bodies: dict[Implementation, str]
) -> tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]]:
    """Modes and implementations, by name, of ``doctor --json`` with these packages installed."""
    for row, body in bodies.items():
        fakes.install(packages, row, body)
    with fakes.importable(packages):
        assert run("--json", "--device", "cpu") == 0
    values = json.loads(capsys.readouterr().out)
    named = [{x["name"]: x for x in values[key]} for key in ("modes", "implementations")]
    return named[0], named[1]


def test_packages_that_work_fail_to_import_and_crash(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes, rows = examine(packages, capsys, {FLASH: "good", SAGE: "import error", SAGE_3: "abort"})
    assert modes["flash_attn"]["itself"]
    assert rows["flash_attn"]["passed"]
    assert float(str(rows["flash_attn"]["error"])) < 0.01
    assert float(str(rows["flash_attn"]["speed"])) > 0
    assert modes["sageattn"]["runs"] == "sdpa"
    assert "libcudart" in str(modes["sageattn"]["why"])
    assert "SIGABRT" in str(rows["sageattn3.blackwell"]["objection"])


def test_packages_that_lie(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes, rows = examine(packages, capsys, {FLASH: "noise", SAGE: "nan", SAGE_3: "crash"})
    assert {name: mode["runs"] for name, mode in modes.items()} == dict.fromkeys(modes, "sdpa")
    codes = {name: row["objection"]["code"] for name, row in rows.items() if row["objection"]}  # type: ignore[index]
    assert codes == {
        "flash_attn": "self-test-error",
        "sageattention.sageattn_1": "self-test-not-finite",
        "sageattn3.blackwell": "self-test-crashed",
    }


@pytest.fixture
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEWAN_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_text_fits_80_columns_and_names_every_mode(
    no_gpu: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run() == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    for row in catalogue.ROWS:
        assert (row.name in text) == (not row.emulated)
    for words in (
        "sagewan.fused_block",
        "sagewan.block",
        "sageattn_3_fp4",
        "→ sdpa",
        "needs an NVIDIA GPU",
        "torch",
    ):
        assert words in text


@pytest.mark.parametrize(("mode", "code"), [("sdpa", 0), ("sageattn_3_fp4", 3)])
def test_require_is_answered_by_the_exit_code(
    no_gpu: None, capsys: pytest.CaptureFixture[str], mode: str, code: int
) -> None:
    assert run("--require", mode) == code
    assert ("needs an NVIDIA GPU" in capsys.readouterr().err) == bool(code)


def test_an_unknown_mode_or_device_is_refused_before_anything_is_tried() -> None:
    with pytest.raises(RequestError, match="did you mean sageattn"):
        run("--require", "sageatn")
    with pytest.raises(RequestError, match="this machine has cpu"):
        run("--device", "cuda:9")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, argparse\nfrom sagewan.cli import doctor\n"
        "doctor.add_arguments(argparse.ArgumentParser())\n"
        "assert not {'torch', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
