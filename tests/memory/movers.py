"""Movers without a device, that run copies as late or as early as their marks allow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagewan.memory.mover import Mark
from sagewan.memory.pinned import NoRegister, Register


@dataclass
class LateMover:
    """Copies run when something waits for them, and not before: whoever computes without having
    waited reads the poison. What is asked, in order, is in ``log``."""

    register: Register = field(default_factory=NoRegister)
    log: list[str] = field(default_factory=list)
    queue: list[Callable[[], object]] = field(default_factory=list)
    done: int = 0
    issued: int = 0

    def empty(self, nbytes: int) -> Tensor:
        self.log.append(f"empty {nbytes}")
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.log.append("copy")
        self.queue.append(lambda: target.copy_(source))
        self.issued += 1

    def copied(self) -> Mark:
        return self.issued

    def computed(self) -> Mark:
        self.log.append("computed")
        return 0

    def compute_waits(self, mark: Mark) -> None:
        self.log.append("compute waits")
        self.host_waits(mark)

    def copy_waits(self, mark: Mark) -> None:
        self.log.append("copy waits")

    def host_waits(self, mark: Mark) -> None:
        while mark is not None and self.done < mark:
            self.queue.pop(0)()
            self.done += 1


class EarlyMover(LateMover):
    """Copies run at once: whoever copies before the last use of a buffer spoils its block."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        super().copy(target, source)
        self.host_waits(self.issued)
