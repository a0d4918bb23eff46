"""Latents → frames, by the VAE: one latent frame at a time, or tile by tile."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sagewan.memory.pinned import pinned_empty
from sagewan.model.vae import decode_pieces, decode_tiles
from sagewan.pipeline.build import Components
from sagewan.pipeline.conditions import denormalized
from sagewan.pipeline.guard import FrameGuard
from sagewan.plan.plan import Plan

# What one call of the decoder may make of several videos: 16 pieces of four frames of 256 × 256.
_PIXELS = 16 * 4 * 256 * 256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@torch.inference_mode()
def decode(
    components: Components, plan: Plan, latents: Tensor, guard: FrameGuard
) -> "Iterator[NDArray[np.uint8]]":
    """Latents [1, C, F, H, W] → the video's frames, uint8 RGB [height, width, 3], one by one.

    A latent frame is decoded when its first frame is asked for, on a GPU one sooner, so that only
    a few frames are in memory, and a caller may stop between two; in tiles, all bytes of the video
    are. Frames are cut from the grid about their centre to the plan's size, so that what stood in
    the middle stays there. The guard is shown what bytes can't tell: whether every value was
    finite.
    """
    with components.decoder.on(plan.device.torch_name) as vae:
        ready = _ready(latents, vae)
        if plan.memory.decode_tile is None:
            pieces = decode_pieces(ready, vae, plan.decoding.at_once)
            yield from streamed(pieces, plan.size, guard, ahead=int(plan.device.is_cuda))
            return
        whole = _whole_frames(ready, vae, plan, guard)
    yield from _cropped(whole, plan.size)[0].numpy()


def streamed(
    pieces: Iterator[Tensor], size: tuple[int, int], guard: FrameGuard, *, ahead: int
) -> "Iterator[NDArray[np.uint8]]":
    """The frames [height, width, 3] of pieces [1, 3, f, H, W], one by one, while ``ahead`` more
    pieces are under way."""
    for frames in _ahead((_sent(piece, size) for piece in pieces), ahead):
        yield from frames.taken(guard)


@dataclass(frozen=True)
class _Frames:
    """Frames on their way to the host, uint8 [f, height, width, 3], and whether all their values
    are finite; ``there`` is None once they are there."""

    frames: Tensor
    finite: Tensor
    there: torch.cuda.Event | None

    def taken(self, guard: FrameGuard) -> "NDArray[np.uint8]":
        """Wait for them."""
        if self.there is not None:
            self.there.synchronize()
        guard.see_values(finite=bool(self.finite))
        return self.frames.numpy()


def _sent(piece: Tensor, size: tuple[int, int]) -> _Frames:
    """Send a piece to the host, without waiting: on a GPU the decoder goes on meanwhile."""
    frames, finite = _cropped(frame_bytes(piece), size)[0], piece.isfinite().all()
    if not piece.is_cuda:
        return _Frames(frames, finite, None)
    host = [pinned_empty(x.shape, x.dtype).copy_(x, non_blocking=True) for x in (frames, finite)]
    there = torch.cuda.Event()
    # The stream of the piece's own GPU: torch's current one may be another.
    there.record(torch.cuda.current_stream(piece.device))
    return _Frames(host[0], host[1], there)


def _ahead(pieces: Iterator[_Frames], count: int) -> Iterator[_Frames]:
    """The same pieces, each when ``count`` more are under way: while the GPU decodes these, the
    caller writes that one."""
    waiting: deque[_Frames] = deque()
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _ready(latents: Tensor, vae: Any) -> Tensor:
    """Latents as the decoder takes them; its dtype rounds them last."""
    return denormalized(latents.to(vae.device, torch.float32), vae).to(vae.dtype)


def _whole_frames(latents: Tensor, vae: Any, plan: Plan, guard: FrameGuard) -> Tensor:
    """All frames at the grid's size, uint8 [1, F, H, W, 3] on the host, put together from tiles."""
    assert plan.memory.decode_tile is not None
    width, height = plan.grid_size
    frames = torch.empty(1, plan.frames, height, width, 3, dtype=torch.uint8)
    for (rows, columns), first, piece in decode_tiles(latents, vae, plan.memory.decode_tile):
        guard.see_values(finite=bool(piece.isfinite().all()))
        frames[:, first : first + piece.shape[2], rows, columns] = frame_bytes(piece).cpu()
    return frames


@torch.inference_mode()
def decode_batch(components: Components, plan: Plan, latents: Tensor) -> Tensor:
    """Latents [B, C, F, H, W] → all frames, uint8 RGB [B, T, height, width, 3] on the device: the
    values that :func:`decode` gives. A few small videos are decoded at a time."""
    width, height = plan.grid_size
    together = plan.decoding.at_once
    at_once = max(1, _PIXELS // (width * height * plan.model.temporal * together))
    with components.decoder.on(plan.device.torch_name) as vae:
        if plan.memory.decode_tile is not None:
            ready = (_ready(one, vae) for one in latents.split(1))
            whole = torch.cat([_whole_frames(one, vae, plan, FrameGuard()) for one in ready])
            return _cropped(whole, plan.size).to(latents.device)
        videos = [
            torch.cat(
                [
                    _cropped(frame_bytes(x), plan.size)
                    for x in decode_pieces(_ready(part, vae), vae, together)
                ],
                dim=1,
            )
            for part in latents.split(at_once)
        ]
    return torch.cat(videos)


def frame_bytes(piece: Tensor) -> Tensor:
    """[B, 3, f, H, W], clamped to −1 … 1 → uint8 [B, f, H, W, 3], rounded; NaN is black."""
    levels = (piece.clamp(-1, 1).movedim(1, -1).float() * 0.5 + 0.5) * 255
    return levels.nan_to_num(0).round().to(torch.uint8)


def _cropped(frames: Tensor, size: tuple[int, int]) -> Tensor:
    width, height = size
    top, left = (frames.shape[-3] - height) // 2, (frames.shape[-2] - width) // 2
    return frames[..., top : top + height, left : left + width, :]
