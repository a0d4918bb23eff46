"""PSNR and SSIM against their formulas and properties."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sagewan.errors import ShapeError
from sagewan.pipeline.metrics import likeness, psnr, ssim


def picture(seed: int = 0, height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    plane = 128 + 60 * np.sin(rows / 6) + 50 * np.cos(columns / 9)
    noisy = plane[..., None] + rng.normal(0, 4, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def spoilt(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(9).normal(0, sigma, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def test_psnr_is_the_formula() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, np.full_like(black, 255)) == pytest.approx(0)
    assert psnr(black, np.full_like(black, 1)) == pytest.approx(20 * math.log10(255))
    assert math.isinf(psnr(black, black))


def test_ssim_is_the_formula_summed_the_slow_way() -> None:
    image, other = picture(1, 13, 12), spoilt(picture(1, 13, 12), 20)
    luma = np.array([0.299, 0.587, 0.114])
    x, y = image.astype(float) @ luma, other.astype(float) @ luma
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for top in range(3):
        for left in range(2):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 2.55**2, 7.65**2
            alike = (2 * ma * mb + c1) * (2 * cov + c2)
            values.append(alike / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(image, other) == pytest.approx(np.mean(values), abs=1e-9)


def test_both_fall_as_noise_grows_and_do_not_care_for_the_order() -> None:
    image = picture()
    weak, strong = spoilt(image, 3), spoilt(image, 25)
    assert ssim(image, image) == pytest.approx(1)
    assert 1 > ssim(image, weak) > ssim(image, strong) > -1
    assert psnr(image, weak) > psnr(image, strong)
    assert ssim(image, weak) == pytest.approx(ssim(weak, image))


def test_a_video_is_one_number_of_each() -> None:
    video = [picture(seed) for seed in range(3)]
    equal = likeness(video, iter(video))
    assert (equal.psnr, equal.frames) == (math.inf, 3)
    assert equal.ssim == pytest.approx(1)
    assert equal.to_json()["psnr"] is None
    assert equal.to_json()["equal"] is True
    one_bad = likeness(video, [*video[:2], spoilt(video[2], 20)])
    assert one_bad.psnr == pytest.approx(
        psnr(np.stack(video), np.stack([*video[:2], spoilt(video[2], 20)])), abs=1e-4
    )


def test_small_pictures_and_refusals() -> None:
    assert ssim(picture(0, 4, 30), picture(0, 4, 30)) == pytest.approx(1)
    with pytest.raises(ShapeError, match="one size"):
        ssim(picture(0, 20, 20), picture(0, 20, 22))
    with pytest.raises(ShapeError, match="numbers of frames"):
        likeness([picture()], [picture(), picture()])
    with pytest.raises(ShapeError, match="without frames"):
        likeness([], [])
