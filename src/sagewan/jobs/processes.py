"""Which processes still live: a number alone does not tell, since it is given again."""

import platform
from dataclasses import dataclass

import psutil

# Seconds by which two readings of one process's start may differ; the boot is told in whole ones.
_SAME_START = 2.0


@dataclass(frozen=True)
class Process:
    """A process of this or of another machine, told from a later one with the same number."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Process":
        own = psutil.Process()
        return cls(platform.node(), own.pid, _started(own))

    @property
    def is_here(self) -> bool:
        """Whether it is of this machine; of another nothing can be known."""
        return self.host == platform.node()

    @property
    def alive(self) -> bool:
        try:
            return abs(_started(psutil.Process(self.pid)) - self.started) < _SAME_START
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


def _started(process: psutil.Process) -> float:
    """When a process began, in seconds, the same however the clock is set in between."""
    # Linux counts from the boot, and psutil adds the time of the boot by the clock of now.
    boot = psutil.boot_time() if psutil.LINUX else 0.0
    return float(process.create_time() - boot)
