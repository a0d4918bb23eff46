"""What this machine has, asked of the driver and of package metadata: torch is not imported."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sagewan.pipeline.segments import let_segments_grow
from sagewan.plan.catalogue import CUDA_BINDINGS, NVRTC
from sagewan.plan.hardware import Device, Hardware

logger = logging.getLogger(__name__)

PACKAGES = (
    "sagewan",
    "torch",
    "triton",
    "triton-windows",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "av",
    "comfy-kitchen",
    "flash-attn-4",
    "flash-attn-3",
    "flash-attn",
    "sageattention",
    "sageattn3",
    CUDA_BINDINGS,
    *NVRTC,
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cutlass-dsl",
    "nvidia-ml-py",
)


def probe() -> Hardware:
    """The machine as values. Right without a GPU, a driver or torch; takes some milliseconds."""
    # NVML counts GPUs by their place on the bus. CUDA would count the fastest first, and cuda:1
    # would then be another card than the one that was planned for.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    devices, driver = _gpus()
    total, free = _memory()
    return Hardware(
        cpu=Device(name=_cpu_name(), memory_total=total, memory_free=free),
        devices=devices,
        memory_total=total,
        cores=_cores(),
        system=platform.system(),
        python=platform.python_version(),
        driver=driver,
        torch_cuda=_torch_cuda(),
        packages=_packages(),
        segments_grow=let_segments_grow(),
    )


def _gpus() -> tuple[tuple[Device, ...], str | None]:
    """The visible GPUs and the driver's version, by NVML; none where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        logger.warning("nvidia-ml-py is not installed: GPUs can't be found")
        return (), None
    except pynvml.NVMLError as error:
        logger.debug("no NVIDIA driver: %s", error)
        return (), None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = list(_visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
        return tuple(_gpu(pynvml, index, handle) for index, handle in enumerate(handles)), driver
    except pynvml.NVMLError as error:
        logger.warning("the NVIDIA driver does not answer: %s", error)
        return (), None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _visible(nvml: Any, setting: str | None) -> Iterator[Any]:
    """NVML's handles in the order in which CUDA numbers the GPUs under CUDA_VISIBLE_DEVICES."""
    every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if setting is None:
        yield from every
        return
    identifiers = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in every]
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit() and int(entry) < len(every):
            yield every[int(entry)]
            continue
        named = [i for i, uuid in enumerate(identifiers) if entry and uuid.startswith(entry)]
        if len(named) != 1:
            return  # As CUDA: the list ends at the first entry that names no GPU.
        yield every[named[0]]


def _gpu(nvml: Any, index: int, handle: Any) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Device(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        index=index,
        sm=major * 10 + minor,
        memory_total=memory.total,
        memory_free=memory.free,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _torch_cuda() -> str | None:
    """The CUDA version torch was built for, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"""^cuda\b[^=\n]*=\s*['"]([\d.]+)['"]""", text, re.MULTILINE)
    return found.group(1) if found else None


def _packages() -> Mapping[str, str]:
    """Installed versions by distribution name; a damaged installation counts as absent."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, KeyError):
            version: str | None = importlib.metadata.version(name)
            if version:
                versions[name] = version
    return versions


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine() or "CPU"


def _memory() -> tuple[int, int]:
    """Bytes of host memory, all and available, no more than a container is allowed."""
    if platform.system() == "Windows":
        return _windows_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
        free = int(found.group(1)) * 1024 if found else total
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        total = min(total, limit)
    return total, min(free, total)


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            *((f"other_{i}", ctypes.c_ulonglong) for i in range(5)),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.total, status.available
