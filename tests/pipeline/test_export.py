"""Videos: what goes in comes out, with its settings, or one sentence."""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from sagewan.errors import RequestError
from sagewan.pipeline.export import KEY, Video, metadata_of, read_settings, write_video
from sagewan.pipeline.files import written_whole


def moving_ball(width: int = 64, height: int = 48, count: int = 9) -> list[np.ndarray]:
    """A red ball on a shaded ground, as smooth as what a model draws."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    frames = []
    for index in range(count):
        inside = np.clip(9 - np.hypot(rows - 24, columns - 12 - 4 * index), 0, 1)[..., None]
        ground = np.stack([rows * 2, columns, 90 + 0 * rows], axis=-1)
        frames.append((inside * [200, 30, 40] + (1 - inside) * ground).astype(np.uint8))
    return frames


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_frames_come_back(tmp_path: Path) -> None:
    frames = moving_ball()
    video = write_video(tmp_path / "a.mp4", frames, fps=12)
    assert video == Video(size=(64, 48), frames=9, fps=12)
    back = decoded(tmp_path / "a.mp4")
    assert len(back) == 9
    # Chroma of half the resolution costs the edge of the ball.
    worst = min(psnr(a, b) for a, b in zip(frames, back, strict=True))
    assert worst > 32, f"{worst:.1f} dB"


def test_colours_are_neither_shifted_nor_stretched(tmp_path: Path) -> None:
    for colour in ((255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)):
        frame = np.full((32, 32, 3), colour, np.uint8)
        write_video(tmp_path / "a.mp4", [frame], fps=12)
        off = np.abs(decoded(tmp_path / "a.mp4")[0].astype(int) - frame).max()
        assert off <= 4, f"{colour} came back {off} levels off"


def test_the_stream_plays_everywhere_and_from_the_web(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_ball(), fps=12)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert int(codec.colorspace) == 1
        assert int(codec.color_range) == 1
        assert container.streams.video[0].average_rate == 12
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("size", [(63, 47), (63, 48), (64, 47)])
def test_an_odd_side_is_padded_by_its_edge(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = moving_ball(*size)
    video = write_video(tmp_path / "a.mp4", frames, fps=12)
    assert video.size == (64, 48)
    back = decoded(tmp_path / "a.mp4")[0]
    assert psnr(frames[0], back[: size[1], : size[0]]) > 32


def test_the_same_video_is_the_same_bytes(tmp_path: Path) -> None:
    tags = metadata_of({"prompt": "x"}, {}, "x")
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, moving_ball(count=30), fps=12, metadata=tags)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_frames_are_taken_one_by_one(tmp_path: Path) -> None:
    """A long video is never whole in memory: a frame is asked for when the last was encoded."""
    path = tmp_path / "a.mp4"
    given: list[int] = []
    sizes: list[int] = []
    noise = np.random.default_rng(0).integers(0, 255, (120, 64, 64, 3), dtype=np.uint8)

    def frames() -> Iterator[np.ndarray]:
        for index, frame in enumerate(noise):
            given.append(index)
            sizes.append(path.stat().st_size if path.exists() else 0)
            yield frame

    write_video(path, frames(), fps=12)
    assert len(given) == 120
    assert sizes[-1] > 0, "nothing was written before the last frame was there"


@pytest.mark.parametrize(
    "prompt", ["a red ball", "红色的球 向右滚动", 'quote" \\ ; = \n\n#', "\udce9"]
)
def test_settings_come_back(tmp_path: Path, prompt: str) -> None:
    path = tmp_path / "a.mp4"
    settings = {"prompt": prompt, "seed": 2**63 - 1, "size": [64, 48]}
    write_video(path, moving_ball(), fps=12, metadata=metadata_of(settings, {"plan": {}}, prompt))
    assert read_settings(path) == settings
    with av.open(str(path)) as container:
        assert set(json.loads(container.metadata[KEY])) == {"plan", "request", "schema", "version"}
        assert container.metadata["comment"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read_settings(tmp_path / "a.mp4")


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 5000])
def test_a_file_that_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(RequestError, match="is not a video"):
        read_settings(tmp_path / "a.mp4")


def test_a_folder_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a video"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("tag", "sentence"),
    [
        (None, "holds no settings"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": 99, "version": "9.9", "request": {}}', "written by sagewan 9.9.*update"),
        ('{"schema": 1, "request": 5}', "update"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, tag: str | None, sentence: str) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, moving_ball(), fps=12, metadata={} if tag is None else {KEY: tag})
    with pytest.raises(RequestError, match=sentence):
        read_settings(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where the system lets us have one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 256, 256, 3), dtype=np.uint8)
    target = small_disk / "a.mp4"
    with pytest.raises(RequestError, match="the disk is full"), written_whole(target) as partial:
        write_video(partial, noise, fps=12)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_at_the_very_end(small_disk: Path) -> None:
    """Some encoders only find out when the index is written."""
    noise = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    write_video(small_disk / "size.mp4", noise, fps=12)
    size = (small_disk / "size.mp4").stat().st_size
    (small_disk / "filler").write_bytes(b"x" * (200 * 1024 - size - size // 2))
    target = small_disk / "a.mp4"
    with pytest.raises(RequestError, match="the disk is full"), written_whole(target) as partial:
        write_video(partial, noise, fps=12)
    assert not target.exists()
