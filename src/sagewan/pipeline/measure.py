"""The most memory a run took of its device."""

import sys

from sagewan.plan.hardware import Device


def start_measuring(device: Device) -> None:
    """The peak is counted from here on."""
    import torch

    if device.is_cuda:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device.torch_name)


def peak_device_bytes(device: Device) -> int | None:
    """The most memory torch held on a GPU; on a CPU the most this process ever held.

    None where the system does not tell.
    """
    import torch

    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.torch_name)
    return _peak_of_process()


def device_bytes(device: Device) -> int:
    """What torch holds on a GPU now; on a CPU what this process holds."""
    if device.is_cuda:
        import torch

        return torch.cuda.memory_allocated(device.torch_name)
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_host_bytes() -> int | None:
    """The most memory this process ever held on the host; None where the system does not tell."""
    return _peak_of_process()


def _peak_of_process() -> int | None:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
