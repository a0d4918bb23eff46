"""What this process holds of the device and of the host while a pipeline runs."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sagewan.plan.hardware import GIB

DEVICE = "cuda:0"
STAGE: dict[str, Any] = {"now": "load", "allocated": {}}


def enter(stage: str) -> None:
    """From here on it is this stage; of the one before torch knows the most that was allocated."""
    before = STAGE["now"]
    if stage != before:
        most = max(STAGE["allocated"].get(before, 0), torch.cuda.max_memory_allocated())
        STAGE["allocated"][before] = most
        torch.cuda.reset_peak_memory_stats()
        STAGE["now"] = stage


# What this process holds beyond torch's memory (GiB, None: the driver says), the bytes of the
# random weights that stand for a file's pages, and a file to make once the GPU is not needed.
HELD: dict[str, Any] = {"context": None, "stand_ins": {}, "given_back": None}


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """The most of the device that the process holds, as the driver tells, and of the host's memory,
    in bytes, sampled every 10 ms; and the most that torch allocated of the device."""
    STAGE.update(now="load", allocated={})
    HELD.update(stand_ins={})
    peak: dict[str, Any] = {"device": 0, "stages": {}}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            found = {"device": used_bytes(), **host_bytes()}
            found["pinned_by_torch"] = torch.cuda.host_memory_stats().get(
                "allocated_bytes.current", 0
            )
            stage = peak["stages"].setdefault(STAGE["now"], {})
            for key, value in found.items():
                stage[key] = max(stage.get(key, 0), value)
            peak["device"] = max(peak["device"], found["device"])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        enter("after")
        for stage, allocated in STAGE["allocated"].items():
            peak["stages"].setdefault(stage, {})["allocated"] = allocated


def used_bytes() -> int:
    """Bytes of the device in use; without ``--context``, nothing else is to run on it."""
    if HELD["context"] is not None:
        return torch.cuda.memory_reserved() + int(HELD["context"] * GIB)
    free, total = torch.cuda.mem_get_info()
    return total - free


def host_bytes() -> dict[str, int]:
    """Bytes of the host: all that is resident, and what of it is no file's page."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")
    }
    resident = {"host": found.get("RssAnon", 0) + found.get("RssShmem", 0)}
    return {**resident, "host_and_files": resident["host"] + found.get("RssFile", 0)}


def context_bytes() -> int:
    """Bytes of the device that are not torch's, once the libraries of a run have been called."""
    x = torch.randn(512, 512, device=DEVICE, dtype=torch.bfloat16)
    packed = x.to(torch.float8_e4m3fn)
    one = torch.ones((), device=DEVICE)
    torch._scaled_mm(packed, packed.t(), one, one, out_dtype=torch.bfloat16)  # noqa: SLF001
    heads = x.view(1, 4, 128, 512)[..., :128]
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.nn.functional.conv3d(x.view(1, 16, 4, 64, 64), x.view(-1)[:6912].view(16, 16, 3, 3, 3))
    torch.cuda.synchronize()
    del x, packed, one, heads
    clear()
    return used_bytes() - torch.cuda.memory_reserved()


def context_alone() -> dict[str, Any]:
    """As :func:`context_bytes`, by the driver's free memory and by what it says of processes;
    the first is right only where nothing else runs on the GPU."""
    context = context_bytes()
    cached = torch.cuda.memory_reserved()
    return {
        "context": round(context / GIB, 3),
        "by_process": [round((used - cached) / GIB, 3) for used in of_process()],
        "cached": round(cached / GIB, 3),
    }


def of_process() -> list[int]:
    """Bytes that the driver's library counts for this process; none where it knows other ids."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    processes = [x for one in devices for x in pynvml.nvmlDeviceGetComputeRunningProcesses(one)]
    return [x.usedGpuMemory for x in processes if x.pid == os.getpid() and x.usedGpuMemory]


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
