"""How alike two videos are: PSNR and SSIM, frame by frame, or of whole batches on a device."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sagewan.errors import ShapeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

PEAK = 255.0
# The window and the two constants of Wang, Bovik, Sheikh, Simoncelli: Image quality assessment,
# IEEE Transactions on Image Processing 13 (2004), section III.
_TAPS, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
# Luma of ITU-R BT.601, on which SSIM is usually told.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Likeness:
    """``psnr`` in dB over all values of all frames, infinite for equal videos; ``ssim`` on luma,
    the mean over the frames, 1 for equal videos; ``frames`` how many were compared."""

    psnr: float
    ssim: float
    frames: int

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: the PSNR of equal videos is null, and ``equal`` says why."""
        equal = math.isinf(self.psnr)
        return {
            "psnr": None if equal else self.psnr,
            "ssim": self.ssim,
            "frames": self.frames,
            "equal": equal,
        }


def likeness(
    frames: "Iterable[NDArray[np.uint8]]", others: "Iterable[NDArray[np.uint8]]"
) -> Likeness:
    """Compare two videos, uint8 RGB frames [H, W, 3] as they come; only two are held at once.

    Raises ShapeError if they differ in size or in number of frames, or have none.
    """
    errors: list[float] = []
    similarities: list[float] = []
    try:
        for frame, other in zip(frames, others, strict=True):
            errors.append(mean_square(frame, other))
            similarities.append(ssim(frame, other))
    except ValueError as error:
        if isinstance(error, ShapeError):
            raise
        raise ShapeError("the two videos have different numbers of frames") from None
    if not errors:
        raise ShapeError("a video without frames can't be compared")
    count = len(errors)
    return Likeness(decibels(sum(errors) / count), sum(similarities) / count, count)


def psnr(image: "NDArray[np.uint8]", other: "NDArray[np.uint8]") -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite if equal."""
    return decibels(mean_square(image, other))


def mean_square(image: "NDArray[np.uint8]", other: "NDArray[np.uint8]") -> float:
    """The mean squared difference of two uint8 arrays. Raises ShapeError for unequal shapes."""
    return float(square_errors(*_tensors(image, other)).mean())


def ssim(image: "NDArray[np.uint8]", other: "NDArray[np.uint8]") -> float:
    """Structural similarity of two RGB pictures, uint8 [H, W, 3]; see :func:`similarities`. Raises
    ShapeError for unequal shapes."""
    return float(similarities(*_tensors(image, other)))


def square_errors(frames: "Tensor", others: "Tensor") -> "Tensor":
    """Squared differences, float64 [...], the mean of each picture of uint8 [..., H, W, 3]."""
    return (frames.double() - others.double()).square().mean((-1, -2, -3))


def similarities(frames: "Tensor", others: "Tensor") -> "Tensor":
    """Structural similarity on luma, float64 [...], of each picture of uint8 RGB [..., H, W, 3]:
    the mean over every place where the 11×11 Gaussian window fits; on a side below 11 pixels, the
    window is that long."""
    x, y = _luma(frames), _luma(others)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x**2
    variance_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    scale = (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    return (alike / scale).mean((-1, -2))


def decibels(error: float) -> float:
    """PSNR of a mean squared difference; infinite for none."""
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def _tensors(image: "NDArray[np.uint8]", other: "NDArray[np.uint8]") -> "tuple[Tensor, Tensor]":
    import torch

    if image.shape != other.shape:
        raise ShapeError(
            f"pictures of {image.shape} and {other.shape} can't be compared: make both one size"
        )
    # Copies: frames may be read-only, which torch warns of, or flipped, which it refuses.
    return torch.from_numpy(image.copy()), torch.from_numpy(other.copy())


def _luma(frames: "Tensor") -> "Tensor":
    red, green, blue = frames.double().unbind(-1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blurred(plane: "Tensor") -> "Tensor":
    """[..., H, W] → the weighted means of the Gaussian window, only where it fits whole."""
    for _ in range(2):
        window = _window(min(_TAPS, plane.shape[-2]))
        kept = plane.shape[-2] - len(window) + 1
        blurred = window[0] * plane[..., :kept, :]
        for at, weight in enumerate(window[1:], start=1):
            blurred.add_(plane[..., at : at + kept, :], alpha=weight)
        plane = blurred.mT
    return plane


def _window(taps: int) -> list[float]:
    middle = (taps - 1) / 2
    weights = [math.exp(-((at - middle) ** 2) / (2 * _SIGMA**2)) for at in range(taps)]
    return [weight / sum(weights) for weight in weights]
