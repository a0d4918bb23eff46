"""The probe with and without a driver, with made-up NVML answers, and without torch."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from sagewan.pipeline import probe as probe_module
from sagewan.pipeline.probe import probe

GPUS = (
    ("GPU-aaaa1111", "NVIDIA RTX 3080", (8, 6), 10),
    ("GPU-bbbb2222", "NVIDIA H100 80GB HBM3", (9, 0), 80),
    ("GPU-bbbb3333", "NVIDIA RTX 5090", (12, 0), 32),
)
GIB = 2**30


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs, in the order of the bus."""
    answers: dict[str, Callable[..., object]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.159.04",
        "nvmlDeviceGetCount": lambda: len(GPUS),
        "nvmlDeviceGetHandleByIndex": lambda index: GPUS[index],
        "nvmlDeviceGetUUID": lambda gpu: gpu[0],
        "nvmlDeviceGetName": lambda gpu: gpu[1].encode(),  # as older versions answer
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu[2],
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(
            total=gpu[3] * GIB, free=gpu[3] * GIB - 1
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_have_the_names_sizes_and_capabilities_that_nvml_gives(nvml: None) -> None:
    hardware = probe()
    assert hardware.driver == "580.159.04"
    assert [device.name for device in hardware.devices] == [gpu[1] for gpu in GPUS]
    assert [device.sm for device in hardware.devices] == [86, 90, 120]
    assert [device.index for device in hardware.devices] == [0, 1, 2]
    assert hardware.devices[1].memory_total == 80 * GIB
    assert hardware.devices[1].memory_free == 80 * GIB - 1


@pytest.mark.parametrize(
    ("setting", "capabilities"),
    [
        ("2,0", [120, 86]),
        ("1", [90]),
        ("", []),
        ("-1", []),
        ("0,7,1", [86]),  # CUDA stops at the first that does not exist
        ("GPU-bbbb3333,GPU-aaaa", [120, 86]),
        ("GPU-bbbb", []),  # two begin so
        (" 1 , 2 ", [90, 120]),
    ],
)
def test_hidden_gpus_are_not_counted(
    nvml: None, monkeypatch: pytest.MonkeyPatch, setting: str, capabilities: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    devices = probe().devices
    assert [device.sm for device in devices] == capabilities
    assert [device.torch_name for device in devices] == [
        f"cuda:{index}" for index in range(len(capabilities))
    ]


def test_cuda_is_told_to_count_as_nvml_does(nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    probe()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_missing_or_failing_driver_means_no_gpu(
    nvml: None, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, call, fail)
    hardware = probe()
    assert hardware.devices == ()
    assert hardware.device("auto") is hardware.cpu


def test_without_the_nvml_package_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probe().devices == ()


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n", "13.0"),
        ("cuda = '12.8'\n", "12.8"),
        ("cuda: str | None = None\n", None),
        ("", None),
    ],
)
def test_torchs_cuda_is_read_from_its_version_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cuda: str | None
) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    (folder / "version.py").write_text(text, encoding="utf-8")
    spec = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(probe_module.importlib.util, "find_spec", lambda name: spec)
    assert probe().torch_cuda == cuda


def test_torch_that_is_not_installed_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module.importlib.util, "find_spec", lambda name: None)
    assert probe().torch_cuda is None


def test_versions_are_those_of_the_metadata() -> None:
    packages = probe().packages
    assert packages["torch"] == importlib.metadata.version("torch")
    assert "sageattn3" not in packages


def test_damaged_metadata_counts_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sageattention-1.0.6.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "sageattention" not in probe().packages


def test_this_machine_has_memory_and_cores() -> None:
    hardware = probe()
    assert hardware.cores >= 1
    assert hardware.cpu.name
    assert 0 < hardware.cpu.memory_free <= hardware.memory_total
    assert hardware.memory_total > GIB // 4


def test_it_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys, time\n"
        "from sagewan.pipeline.probe import probe\n"
        "probe()\n"
        "start = time.perf_counter(); probe(); took = time.perf_counter() - start\n"
        "assert 'torch' not in sys.modules\n"
        "print(took)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 0.25
