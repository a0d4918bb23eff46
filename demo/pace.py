"""How far a training has come, by the clock, and what its losses were."""

from __future__ import annotations

import argparse
import logging
import math
import platform
import time

import diffusers
import torch
from torch import Tensor

log = logging.getLogger("pace")
EVERY = 250  # steps to a line of the log


class Clock:
    """Counts seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.start = time.perf_counter()
        self.seconds = seconds

    @property
    def progress(self) -> float:
        """From 0; 1 when the time is up."""
        return (time.perf_counter() - self.start) / self.seconds

    def rest(self) -> Clock:
        """A clock for the time that is left."""
        return Clock(max(1e-3, (1 - self.progress) * self.seconds))

    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.start

    def cosine(self, least: float = 0.01) -> float:
        """The learning rate's factor: from 1 to almost 0."""
        return max(least, 0.5 + 0.5 * math.cos(math.pi * min(self.progress, 1.0)))


class LossLog:
    """Adds up losses on the device; every so often reads the mean, which also waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)
        self.steps = 0
        self.start = self.last = time.perf_counter()
        self.lines: list[dict[str, float]] = []

    def restart(self) -> None:
        """Count seconds from now."""
        self.start = self.last = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """May be part of a CUDA graph."""
        self.total.add_(loss)
        self.count.add_(1)

    def step(self) -> None:
        """One step is done."""
        self.steps += 1
        if self.steps % 50 == 0 and self.device.type == "cuda":
            torch.cuda.synchronize()  # or the clock would run ahead of the work
        if self.steps % EVERY == 0:
            self._read(EVERY)

    def _read(self, steps: int) -> None:
        loss = (self.total / self.count.clamp(min=1)).item()
        now = time.perf_counter()
        line = {
            "step": self.steps,
            "seconds": round(now - self.start, 1),
            "loss": round(loss, 5),
            "seconds_a_step": round((now - self.last) / max(1, steps), 5),
        }
        log.info("%s", line)
        self.lines.append(line)
        self.total.zero_()
        self.count.zero_()
        self.last = now

    def facts(self, options: argparse.Namespace) -> dict:
        """For the report: settings, losses, and what it ran on."""
        if self.steps % EVERY:
            self._read(self.steps % EVERY)
        gpu = self.device.type == "cuda"
        return {
            "options": {name: str(value) for name, value in vars(options).items()},
            "steps": self.steps,
            "losses": self.lines,
            "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
