"""H.264 in mp4, streamed frame by frame, with the settings that made it inside the file."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagewan import __version__
from sagewan.errors import RequestError
from sagewan.plan.serialize import SCHEMA

if TYPE_CHECKING:
    import av.container
    import av.video.stream
    import numpy as np
    from numpy.typing import NDArray

# The key of our JSON in the file's metadata; "comment" beside it is what players show.
KEY = "sagewan"

# crf 16 shows no loss to the eye. The same frames are to give the same bytes: x264 writes its
# number of threads into the file, so that is fixed; and without cpu-independent, the AVX-512 code
# of its rate control (core 165) gave other bytes in 24 of 1080 runs on a busy machine, with it in
# none.
_X264 = {"crf": "16", "preset": "medium", "x264-params": "cpu-independent=1"}
_THREADS = 4

# use_metadata_tags lets mp4 hold keys of our own; faststart puts the index first, for the web.
_MP4 = {"movflags": "+faststart+use_metadata_tags"}


@dataclass(frozen=True)
class Video:
    """What was written: (width, height) in pixels as in the file, and the number of frames."""

    size: tuple[int, int]
    frames: int
    fps: int


def write_video(
    path: Path,
    frames: "Iterable[NDArray[np.uint8]]",
    *,
    fps: int,
    metadata: Mapping[str, str] | None = None,
) -> Video:
    """Encode uint8 RGB frames [H, W, 3] as they come, H.264 yuv420p, BT.709 limited range.

    Chroma has half the resolution, so a size must be even: the last row or column of an odd one
    is repeated. The same frames, rate and metadata give the same bytes. OSError if the file
    can't be written, the full disk included; what was written by then is the caller's to remove.
    """
    import av

    count = 0
    size = (0, 0)
    stream: av.video.stream.VideoStream | None = None
    with av.open(str(path.absolute()), "w", format="mp4", options=dict(_MP4)) as container:
        container.metadata.update(metadata or {})
        for frame in frames:
            even = _even(frame)
            if stream is None:
                size = (even.shape[1], even.shape[0])
                stream = _stream(container, size, fps)
            container.mux(stream.encode(_yuv(even)))
            count += 1
        if stream is None:
            raise AssertionError("a video has at least one frame")
        container.mux(stream.encode(None))
    return Video(size=size, frames=count, fps=fps)


def _even(frame: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    import numpy as np

    array = np.asarray(frame)
    height, width = array.shape[:2]
    if height % 2 or width % 2:
        array = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(array)


def _stream(
    container: "av.container.OutputContainer", size: tuple[int, int], fps: int
) -> "av.video.stream.VideoStream":
    from av.video.reformatter import ColorRange, Colorspace

    stream = container.add_stream("libx264", rate=fps, options=dict(_X264))
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.thread_count = _THREADS
    # Untagged files are guessed to be BT.601 by some players and BT.709 by others.
    codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
    codec.color_range = ColorRange.MPEG
    return stream


def _yuv(frame: "NDArray[np.uint8]") -> "av.VideoFrame":
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        # Chroma is the mean of its four pixels; the sharper filters ring at coloured edges.
        interpolation=Interpolation.AREA,
    )


def read_frames(path: Path) -> "Iterator[NDArray[np.uint8]]":
    """The frames of a video that :func:`write_video` wrote, uint8 RGB [H, W, 3], as they come."""
    import av
    import numpy as np
    from av.video.reformatter import Colorspace, Interpolation

    with av.open(str(path.absolute())) as container:
        for frame in container.decode(video=0):
            rgb = frame.reformat(
                format="rgb24", src_colorspace=Colorspace.ITU709, interpolation=Interpolation.AREA
            )
            yield rgb.to_ndarray().astype(np.uint8, copy=False)


def metadata_of(
    settings: Mapping[str, Any], facts: Mapping[str, Any], summary: str
) -> dict[str, str]:
    """The tags of a video: ``settings`` make it again, ``facts`` tell what ran, in JSON."""
    # ASCII escapes also carry text that is not valid Unicode, which a file name may be.
    data = {"schema": SCHEMA, "version": __version__, "request": settings, **facts}
    text = json.dumps(data, sort_keys=True)
    return {KEY: text, "comment": summary.encode(errors="replace").decode()}


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of the request inside a video. RequestError, one sentence, if there are none."""
    data = _read_tag(path)
    if data.get("schema") != SCHEMA or not isinstance(data.get("request"), dict):
        version = data.get("version", "of another version")
        raise RequestError(
            f"from={path}: its settings were written by sagewan {version} and can't be read by "
            "this version; update sagewan"
        )
    return dict(data["request"])


def _read_tag(path: Path) -> dict[str, Any]:
    import av

    if not path.exists():
        raise RequestError(f"from={path}: there is no such file; name a video that sagewan made")
    try:
        with av.open(str(path.absolute())) as container:
            text = container.metadata.get(KEY)
    except (OSError, av.FFmpegError) as error:
        raise RequestError(f"from={path} is not a video; name an mp4 that sagewan made") from error
    if text is None:
        raise RequestError(
            f"from={path} holds no settings: it was made by another program, or with "
            "--no-metadata; give the settings as flags"
        )
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RequestError(f"from={path}: its settings are damaged; give them as flags") from error
    if not isinstance(data, dict):
        raise RequestError(f"from={path}: its settings are damaged; give them as flags")
    return data
