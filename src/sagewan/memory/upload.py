"""Weights from the host to a GPU through two pinned buffers: one is filled while the other is sent.

A copy from ordinary memory waits for the pages of the file and for the driver, which stages them by
one thread; here torch's threads fill the buffers (docs/measured.md).
"""

from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from sagewan.memory.pinned import pinned_empty
from sagewan.plan.budget.stage import UPLOAD, UPLOADS

# What is smaller is not worth a buffer.
_LEAST = 1 << 20


def upload(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Copies of these tensors on the device, in the order of what it computes."""
    with torch.inference_mode(mode=False):
        targets = [torch.empty_like(tensor, device=device) for tensor in tensors]
        pairs = list(zip(tensors, targets, strict=True))
        for source, target in pairs:
            if not _staged(source):
                target.copy_(source, non_blocking=True)
        large = [pair for pair in pairs if _staged(pair[0])]
        if large:
            _send(large, torch.device(device))
    return targets


def _send(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    make = pinned_empty if on_gpu else torch.empty
    buffers = [make((UPLOAD,), dtype=torch.uint8) for _ in range(UPLOADS)]
    sent: dict[int, torch.cuda.Event] = {}
    for turn, (source, target) in zip(cycle(range(UPLOADS)), _parts(pairs), strict=False):
        if turn in sent:
            sent[turn].synchronize()
        buffer = buffers[turn][: len(source)]
        buffer.copy_(source)
        target.copy_(buffer, non_blocking=True)
        if on_gpu:
            sent[turn] = torch.cuda.current_stream(device).record_event()


def _staged(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes >= _LEAST


def _parts(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The bytes of each pair, as many at a time as a buffer holds."""
    for source, target in pairs:
        of, to = (x.view(-1).view(torch.uint8) for x in (source, target))
        yield from zip(of.split(UPLOAD), to.split(UPLOAD), strict=True)
