"""Which torch a first start installs, by driver and card."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sagewan.pipeline.checkup import BUILDS

START = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "start.py"))
Gpu = START["Gpu"]


@pytest.mark.parametrize(
    ("driver", "sm", "index"),
    [
        (580, 90, "cu130"),
        (590, 120, "cu130"),
        (580, 75, "cu130"),
        (570, 89, "cu126"),
        (525, 86, "cu126"),
        (580, 70, "cu126"),
        (570, 120, "cpu"),
        (470, 86, "cpu"),
        (580, 35, "cpu"),
    ],
)
def test_the_index_follows_driver_and_card(driver: int, sm: int, index: str) -> None:
    start = START["choose_index"]([Gpu("the card", driver, sm)])
    assert start.index == index
    assert bool(start.advice) == (index == "cpu")


def test_an_old_driver_is_told_which_it_needs() -> None:
    assert "driver 580 or newer, and 570" in START["choose_index"]([Gpu("RTX", 570, 120)]).advice
    assert "driver 525 or newer, and 470" in START["choose_index"]([Gpu("RTX", 470, 86)]).advice


def test_without_a_gpu_the_cpu_build_is_chosen() -> None:
    assert START["choose_index"]([]).index == "cpu"


def test_the_newest_card_decides() -> None:
    gpus = [Gpu("old", 580, 75), Gpu("new", 580, 120)]
    assert START["choose_index"](gpus).index == "cu130"


def test_the_listing_of_nvidia_smi_is_read() -> None:
    listing = "NVIDIA H100 80GB HBM3, 580.159.04, 9.0\nTesla, odd, 595.1, 12.0\n[Not Supported]\n"
    assert START["parse_gpus"](listing) == [
        Gpu("NVIDIA H100 80GB HBM3", 580, 90),
        Gpu("Tesla, odd", 595, 120),
    ]


def test_torch_comes_from_its_index_and_the_rest_from_pip() -> None:
    torch, product = START["install_commands"](Path("python"), "cu130")
    assert torch[-2:] == ["--index-url", "https://download.pytorch.org/whl/cu130"]
    assert "--index-url" not in product
    assert START["install_commands"](Path("python"), "")[0][-1] == "torch"


def test_a_start_opens_the_app_and_a_newer_list_of_packages_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(START["venv"], "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setenv("SAGEWAN_VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("SAGEWAN_TORCH_INDEX", "cpu")
    assert START["main"]([]) == 0
    assert ran[-1][1:] == ["-m", "sagewan", "ui"]
    assert len(ran) == 3
    ran.clear()
    assert START["main"](["doctor"]) == 0
    assert [command[1:] for command in ran] == [["-m", "sagewan", "doctor"]]
    (tmp_path / "venv" / "started").write_text("another")
    START["main"]([])
    assert ran[1][-2] == "-e"


@pytest.mark.skipif(os.name == "nt", reason="Windows has copies in place of links")
def test_an_environment_that_is_there_keeps_its_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interpreter = tmp_path / "python-of-another"
    interpreter.write_text("an interpreter")
    for name in {"python", "python3", Path(os.path.realpath(sys.executable)).name}:
        link = tmp_path / "venv" / "bin" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(interpreter)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(START["venv"].EnvBuilder, "_setup_pip", lambda *_: None)
    monkeypatch.setenv("SAGEWAN_TORCH_INDEX", "cpu")
    START["set_up"](tmp_path / "venv")
    assert interpreter.read_text() == "an interpreter"


def test_a_machine_without_nvidia_smi_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    assert START["find_gpus"]() == []


def test_the_first_start_and_the_doctor_know_the_same_builds() -> None:
    known = [(b.index, b.driver, b.lowest_sm, b.highest_sm) for b in BUILDS]
    assert known == [START["CUDA_13"], START["CUDA_12"]]
