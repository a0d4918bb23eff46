"""Each fault of an installation is one sentence with the fix; a sound machine has none."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from sagewan.pipeline.checkup import build_for, problems
from sagewan.plan.hardware import Hardware
from tests.machines import GPUS, machine


def sound(*gpus: str, torch_cuda: str | None = "13.0", driver: str = "580.95.05") -> Hardware:
    hardware = machine(*gpus, torch_cuda=torch_cuda, torch="2.13.0", triton="3.8.0")
    return replace(hardware, driver=driver)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_sound_machine_has_no_problems(gpu: str) -> None:
    assert problems(sound(gpu)) == []


def test_a_cpu_build_beside_a_gpu_is_told_what_to_run() -> None:
    (sentence,) = problems(sound("H100", torch_cuda=None))
    assert "torch 2.13.0 is a CPU build and can't use NVIDIA H100" in sentence
    assert "pip install --force-reinstall torch --index-url" in sentence
    assert sentence.endswith("/whl/cu130")


def test_the_build_offered_fits_the_driver() -> None:
    (sentence,) = problems(sound("4090", torch_cuda=None, driver="550.54"))
    assert sentence.endswith("/whl/cu126")
    (sentence,) = problems(sound("5090", torch_cuda=None, driver="550.54"))
    assert "renew the NVIDIA driver to 580 or newer" in sentence


def test_blackwell_needs_a_new_enough_cuda() -> None:
    (sentence,) = problems(sound("5090", torch_cuda="12.6"))
    assert "(sm_120) needs torch with CUDA 12.8 or newer, and it has 12.6" in sentence
    assert problems(sound("5090", torch_cuda="12.8")) == []


def test_an_old_driver_for_the_installed_torch() -> None:
    (sentence,) = problems(sound("4090", driver="570.1"))
    assert "driver 570.1 is too old for torch with CUDA 13.0, which needs 580" in sentence


def test_a_gpu_that_cuda_13_dropped() -> None:
    old = replace(GPUS["3080"], name="NVIDIA GTX 1080", sm=61)
    (sentence,) = problems(replace(sound("3080"), devices=(old,)))
    assert "NVIDIA GTX 1080 (sm_61) is older than CUDA 13.0 supports" in sentence
    assert sentence.endswith("/whl/cu126")


@pytest.mark.parametrize(
    ("system", "version", "words"),
    [
        ("Linux", None, "triton is not installed"),
        ("Windows", None, "run pip install triton-windows"),
        ("Linux", "3.1.0", 'triton 3.1.0 is too old, 3.6 is needed: run pip install "triton>=3.6"'),
    ],
)
def test_triton_is_there_and_new_enough(system: str, version: str | None, words: str) -> None:
    packages = {"torch": "2.13.0", **({"triton": version} if version else {})}
    (sentence,) = problems(replace(sound("4090"), system=system, packages=packages))
    assert words in sentence


def test_sm_121_needs_a_newer_triton() -> None:
    spark = replace(GPUS["5090"], name="NVIDIA GB10", sm=121)
    hardware = machine("5090", torch="2.13.0", triton="3.7.1")
    (sentence,) = problems(replace(hardware, devices=(spark,), driver="580.1"))
    assert "3.8 is needed" in sentence


def test_without_a_gpu_only_a_cuda_build_is_remarked() -> None:
    assert problems(machine(torch="2.13.0+cpu")) == []
    (sentence,) = problems(replace(machine(torch="2.13.0"), torch_cuda="13.0"))
    assert "no NVIDIA GPU or driver answers" in sentence
    assert problems(machine()) == ["torch is not installed: run pip install torch"]


def test_the_build_is_the_one_that_the_start_scripts_install() -> None:
    start = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "start.py"))
    for driver in (470, 525, 570, 580, 600):
        for sm in (35, 61, 70, 75, 86, 90, 100, 120):
            build = build_for(replace(GPUS["3080"], sm=sm), f"{driver}.10")
            choice = start["choose_index"]([start["Gpu"]("a card", driver, sm)])
            assert (build.index if build else "cpu") == choice.index, (driver, sm)
