"""The last look at a video: what is not finite, black or constant is never a success.

What is not a number is black in a frame, so the decoder tells of it. A given first picture is shown
as it is, so a broken run that started from one is black only after it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Of 255. A decoder's rounding keeps black below 8; a picture with anything in it spreads further
# than 2 around one value.
BLACK = 8
SPREAD = 2


@dataclass
class FrameGuard:
    """Watches frames go by, uint8 [H, W, 3], and says at the end what is wrong with them all."""

    _finite: bool = field(default=True, init=False)
    _low: "NDArray[np.uint8] | None" = field(default=None, init=False)
    _high: "NDArray[np.uint8] | None" = field(default=None, init=False)
    _high_later: int | None = field(default=None, init=False)

    def see_values(self, *, finite: bool) -> None:
        """Whether all values of some more frames were finite before they became bytes."""
        self._finite = self._finite and finite

    def see(self, frame: "NDArray[np.uint8]") -> None:
        """One more frame."""
        import numpy as np

        low, high = frame.min(axis=(0, 1)), frame.max(axis=(0, 1))
        if self._high is not None:
            self._high_later = max(self._high_later or 0, int(high.max()))
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)

    def objection(self) -> str | None:
        """What the video is, if it is no video: not finite, black, that but for its first frame, or
        of one colour."""
        if not self._finite:
            return "not finite (some of its pixels are NaN or infinite)"
        if self._low is None or self._high is None:
            return None
        if int(self._high.max()) <= BLACK:
            return "black"
        if int((self._high - self._low).max()) <= SPREAD:
            return "one constant colour"
        if self._high_later is not None and self._high_later <= BLACK:
            return "black after its first frame"
        return None
