"""What is wrong with an installation, each in one sentence with the fix; from values alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.version import Version

from sagewan.plan.hardware import Device, Hardware

MIN_TRITON = "3.6"
_INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class TorchBuild:
    """A build of torch: its index, the oldest driver branch, the compute capabilities it holds."""

    index: str
    driver: int
    lowest_sm: int
    highest_sm: int


# As tools/start.py, which runs before anything is installed, has them.
BUILDS = (TorchBuild("cu130", 580, 75, 999), TorchBuild("cu126", 525, 50, 90))


def problems(hardware: Hardware) -> list[str]:
    """Sentences for the user, the most important first; empty on a sound machine."""
    found = list(_torch_problems(hardware))
    for device in hardware.usable:
        found += _device_problems(device, hardware)
    if hardware.usable:
        found += _triton_problems(hardware)
    return list(dict.fromkeys(found))


def build_for(device: Device, driver: str | None) -> TorchBuild | None:
    """The build of torch for this GPU and driver, None if the driver must be renewed first."""
    branch = _branch(driver)
    fitting = (build for build in BUILDS if build.lowest_sm <= device.sm <= build.highest_sm)
    return next((build for build in fitting if branch >= build.driver), None)


def _torch_problems(hardware: Hardware) -> Iterator[str]:
    version = hardware.packages.get("torch")
    if version is None:
        yield "torch is not installed: run pip install torch"
        return
    if hardware.devices and hardware.torch_cuda is None:
        yield (
            f"torch {version} is a CPU build and can't use {hardware.devices[0].name}: "
            f"{_fix(hardware.devices[0], hardware.driver)}"
        )
    if hardware.torch_cuda and not hardware.devices:
        yield (
            f"torch {version} is built for CUDA {hardware.torch_cuda}, and no NVIDIA GPU or driver "
            "answers: everything runs on the CPU"
        )


def _device_problems(device: Device, hardware: Hardware) -> Iterator[str]:
    """What the torch that is installed lacks for this GPU and driver."""
    cuda = Version(hardware.torch_cuda or "0")
    needed = {13: 580, 12: 525}.get(cuda.major, 0)
    if hardware.driver and _branch(hardware.driver) < needed:
        yield (
            f"driver {hardware.driver} is too old for torch with CUDA {cuda}, which needs {needed} "
            f"or newer: renew the driver, or {_fix(device, hardware.driver)}"
        )
    if device.sm >= 100 and cuda < Version("12.8"):
        yield (
            f"{device.name} (sm_{device.sm}) needs torch with CUDA 12.8 or newer, and it has "
            f"{cuda}: {_fix(device, hardware.driver)}"
        )
    if device.sm < 75 and cuda.major >= 13:
        yield (
            f"{device.name} (sm_{device.sm}) is older than CUDA {cuda} supports: "
            f"{_fix(device, hardware.driver)}"
        )


def _triton_problems(hardware: Hardware) -> Iterator[str]:
    name = "triton-windows" if hardware.system == "Windows" else "triton"
    version = hardware.packages.get(name)
    least = "3.8" if any(device.sm == 121 for device in hardware.usable) else MIN_TRITON
    if version is None:
        yield f"{name} is not installed, which kernels are compiled with: run pip install {name}"
    elif Version(version) < Version(least):
        yield f'{name} {version} is too old, {least} is needed: run pip install "{name}>={least}"'


def _fix(device: Device, driver: str | None) -> str:
    build = build_for(device, driver)
    if build:
        return f"run pip install --force-reinstall torch --index-url {_INDEX}/{build.index}"
    wanted = next((b for b in BUILDS if b.lowest_sm <= device.sm <= b.highest_sm), None)
    if wanted is None:
        return f"no build of torch supports sm_{device.sm}"
    return f"renew the NVIDIA driver to {wanted.driver} or newer"


def _branch(driver: str | None) -> int:
    digits = (driver or "").partition(".")[0]
    return int(digits) if digits.isdigit() else 0
