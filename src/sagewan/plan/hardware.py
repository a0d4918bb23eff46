"""What a machine has, as plain values: filled by a probe, or made up by a test."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sagewan.errors import RequestError

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One place to compute. ``sm`` is 90 for compute capability 9.0, and 0 on a CPU."""

    name: str
    index: int = 0
    sm: int = 0
    memory_total: int = 0
    memory_free: int = 0

    @property
    def is_cuda(self) -> bool:
        return self.sm > 0

    @property
    def usual_dtype(self) -> str:
        """What it computes best in: bfloat16 where the hardware has it, float32 on a CPU."""
        if self.is_cuda:
            return "bfloat16" if self.sm >= 80 else "float16"
        return "float32"

    @property
    def torch_name(self) -> str:
        """How torch calls it: ``cpu`` or ``cuda:1``."""
        return f"cuda:{self.index}" if self.is_cuda else "cpu"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine: its GPUs, its CPU, its system, and the versions of the packages that matter.

    ``packages`` maps distribution names to installed versions, read from metadata: nothing is
    imported to fill it. ``torch_cuda`` is the CUDA version torch was built for, None on a CPU
    build, or where torch is not installed. ``segments_grow`` says that the segments in which torch
    takes a GPU's memory can grow, so that less is lost between tensors of different sizes.
    """

    cpu: Device
    devices: tuple[Device, ...] = ()
    memory_total: int = 0
    cores: int = 1
    system: str = "Linux"
    python: str = ""
    driver: str | None = None
    torch_cuda: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    segments_grow: bool = False

    @property
    def usable(self) -> tuple[Device, ...]:
        """The GPUs that the installed torch can drive."""
        return self.devices if self.torch_cuda else ()

    def device(self, name: str) -> Device:
        """The device called ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; RequestError if absent."""
        if name == "cpu" or (name == "auto" and not self.usable):
            return self.cpu
        found = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
        if not found:
            raise RequestError(f"device={name}: use auto, cpu, cuda or cuda:N")
        index = int(found.group(1) or 0)
        if index < len(self.usable):
            return self.usable[index]
        if self.devices and not self.torch_cuda:
            raise RequestError(
                f"device={name}: the installed torch is a CPU build, which can't use "
                f"{self.devices[0].name}; install a CUDA build of torch, or use --device cpu"
            )
        have = ", ".join(["cpu", *(device.torch_name for device in self.usable)])
        raise RequestError(f"device={name}: this machine has {have}")
