"""Videos that are none."""

import numpy as np
import pytest

from sagewan.pipeline.guard import FrameGuard


def verdict(frames: np.ndarray) -> str | None:
    guard = FrameGuard()
    for frame in frames.astype(np.uint8):
        guard.see(frame)
    return guard.objection()


@pytest.mark.parametrize("level", [0, 3, 8])
def test_black_is_refused(level: int) -> None:
    assert verdict(np.full((5, 16, 16, 3), level)) == "black"


@pytest.mark.parametrize("colour", [(128, 128, 128), (255, 255, 255), (200, 30, 40)])
def test_one_colour_is_refused_with_the_noise_of_rounding(colour: tuple[int, int, int]) -> None:
    frames = np.full((5, 16, 16, 3), colour)
    frames[2, 3:5] -= 1
    assert verdict(frames) == "one constant colour"


def test_a_dark_picture_with_one_light_is_a_video() -> None:
    frames = np.zeros((5, 16, 16, 3))
    frames[2, 3, 4] = 60
    assert verdict(frames) is None


def test_a_colour_that_changes_from_frame_to_frame_is_a_video() -> None:
    frames = np.stack([np.full((16, 16, 3), 20 * i + 20) for i in range(5)])
    assert verdict(frames) is None


def test_a_video_that_is_partly_not_finite_is_refused() -> None:
    guard = FrameGuard()
    for frame, finite in zip(np.zeros((5, 16, 16, 3), np.uint8), (1, 1, 0, 1, 1), strict=True):
        guard.see_values(finite=bool(finite))
        guard.see(frame + np.arange(16, dtype=np.uint8)[:, None])
    assert (guard.objection() or "").startswith("not finite")


def test_nothing_seen_is_nothing_said() -> None:
    assert FrameGuard().objection() is None


def test_a_picture_and_then_nothing_is_refused() -> None:
    frames = np.zeros((5, 16, 16, 3))
    frames[0, :8] = 200
    assert verdict(frames) == "black after its first frame"
    assert verdict(frames[:1]) is None, "one frame is all there is"
