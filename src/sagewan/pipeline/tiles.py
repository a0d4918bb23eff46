"""Several videos in one frame, each under its name."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Differences are mostly too small to see.
GAIN = 4
_LINE = 20
_ACROSS = 3


class Wall:
    """Places the frames of up to four videos side by side, four as two by two."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._columns = 2 if len(names) == 4 else min(len(names), _ACROSS)

    def frames(
        self, videos: "Sequence[Iterator[NDArray[np.uint8]]]"
    ) -> "Iterator[NDArray[np.uint8]]":
        """All frames [H, W, 3] uint8 at each moment in one; a shorter video stays at its end, one
        of another size is resized to the first's."""
        for moment in _moments(videos):
            yield self._tiled(moment, self._names)

    def differences(
        self, videos: "Sequence[Iterator[NDArray[np.uint8]]]"
    ) -> "Iterator[NDArray[np.uint8]]":
        """The first video, and how each other differs from it: absolute, four times as strong."""
        import numpy as np

        names = [self._names[0], *(f"{GAIN}x |{name} - first|" for name in self._names[1:])]
        for first, *others in _moments(videos):
            wide = first.astype(np.int16)
            apart = [
                (np.abs(other.astype(np.int16) - wide) * GAIN).clip(0, 255) for other in others
            ]
            yield self._tiled([first, *(gap.astype(np.uint8) for gap in apart)], names)

    def _tiled(
        self, frames: "Sequence[NDArray[np.uint8]]", names: Sequence[str]
    ) -> "NDArray[np.uint8]":
        import numpy as np

        height, width = frames[0].shape[:2]
        rows = -(-len(frames) // self._columns)
        wall = np.zeros((rows * (height + _LINE), self._columns * width, 3), np.uint8)
        for at, (frame, name) in enumerate(zip(frames, names, strict=True)):
            top, left = at // self._columns * (height + _LINE), at % self._columns * width
            wall[top : top + _LINE, left : left + width] = _label(name, width)
            wall[top + _LINE : top + _LINE + height, left : left + width] = frame
        return wall


def _moments(
    videos: "Sequence[Iterator[NDArray[np.uint8]]]",
) -> "Iterator[list[NDArray[np.uint8]]]":
    last: list[NDArray[np.uint8]] = [next(video) for video in videos]
    while True:
        yield [_sized(frame, last[0].shape) for frame in last]
        following = [next(video, None) for video in videos]
        if all(frame is None for frame in following):
            return
        last = [old if new is None else new for old, new in zip(last, following, strict=True)]


def _sized(frame: "NDArray[np.uint8]", shape: tuple[int, ...]) -> "NDArray[np.uint8]":
    import numpy as np
    from PIL import Image

    if frame.shape == shape:
        return frame
    return np.asarray(Image.fromarray(frame).resize((shape[1], shape[0])))


def _label(name: str, width: int) -> "NDArray[np.uint8]":
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, _LINE), (24, 24, 27))
    ImageDraw.Draw(strip).text((6, 3), name, fill="white", font=ImageFont.load_default(12))
    return np.asarray(strip)
