import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sagewan.errors import RequestError
from sagewan.pipeline.pictures import MAX_PIXELS, load_picture

SIZE = (64, 48)


def ramp(width: int = 64, height: int = 48) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([columns * 4, rows * 5, (rows + columns) * 2], -1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_every_usual_format_is_read_as_rgb(suffix: str, tmp_path: Path) -> None:
    found = load_picture(saved(tmp_path / f"a.{suffix}", ramp()), SIZE)
    assert (found.mode, found.size) == ("RGB", SIZE)
    limit = 40 if suffix in ("jpg", "webp", "gif") else 0
    assert np.abs(pixels(found) - pixels(ramp())).max() <= limit


def test_cmyk_is_converted(tmp_path: Path) -> None:
    found = load_picture(saved(tmp_path / "a.tiff", ramp().convert("CMYK")), SIZE)
    assert found.mode == "RGB"
    assert np.abs(pixels(found) - pixels(ramp())).max() <= 1
    jpeg = load_picture(saved(tmp_path / "a.jpg", ramp().convert("CMYK"), quality=95), SIZE)
    assert np.abs(pixels(jpeg) - pixels(ramp())).mean() < 6


def test_a_palette_is_resolved(tmp_path: Path) -> None:
    palette = ramp().quantize(64)
    found = load_picture(saved(tmp_path / "a.png", palette), SIZE)
    assert np.array_equal(pixels(found), pixels(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", SIZE, (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 32, 48))
    if mode == "P":
        path = saved(tmp_path / "a.gif", image)
    else:
        path = saved(tmp_path / "a.png", image.convert(mode))
    found = pixels(load_picture(path, SIZE))
    assert (found[:, :32] == 255).all()
    assert (found[:, 32:] < 40).all()


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGBA", SIZE, (0, 0, 0, 128)))
    assert set(pixels(load_picture(path, SIZE)).flat) == {127}


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    found = pixels(load_picture(path, SIZE))
    assert np.abs(found[..., 0] - values / 257).max() <= 0.5
    assert (found[..., 0] == found[..., 2]).all()


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = saved(tmp_path / "a.png", ramp(48, 64).rotate(90, expand=True), exif=exif)
    found = load_picture(path, (48, 64))
    assert np.array_equal(pixels(found), pixels(ramp(48, 64)))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", SIZE, colour) for colour in ("red", "blue"))
    path = saved(tmp_path / "a.gif", red, save_all=True, append_images=[blue])
    assert load_picture(path, SIZE).getpixel((5, 5)) == (255, 0, 0)


@settings(max_examples=60)
@given(
    given_size=st.tuples(st.integers(16, 200), st.integers(16, 200)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda s: (s[0] * 16, s[1] * 16)),
)
def test_pictures_are_cropped_to_the_proportions_about_their_centre(
    tmp_path_factory: pytest.TempPathFactory,
    given_size: tuple[int, int],
    size: tuple[int, int],
) -> None:
    width, height = given_size
    rows, columns = np.mgrid[:height, :width]
    coded = np.stack([columns, rows, rows * 0], -1).astype(np.uint8)
    path = saved(tmp_path_factory.getbasetemp() / "coded.png", Image.fromarray(coded))
    found = load_picture(path, size)
    # One side is kept whole, the other is within half a pixel of the proportions.
    assert found.width == width or found.height == height
    ideal = min(width, height * size[0] / size[1]), min(height, width * size[1] / size[0])
    assert abs(found.width - max(1, ideal[0])) <= 0.5
    assert abs(found.height - max(1, ideal[1])) <= 0.5
    values = pixels(found)
    left, right = values[0, 0, 0], width - 1 - values[0, -1, 0]
    top, bottom = values[0, 0, 1], height - 1 - values[-1, 0, 1]
    assert abs(left - right) <= 1
    assert abs(top - bottom) <= 1


def test_matching_proportions_are_left_whole(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", ramp(96, 72))
    assert np.array_equal(pixels(load_picture(path, SIZE)), pixels(ramp(96, 72)))


def refused(path: Path, name: str = "image") -> str:
    with pytest.raises(RequestError) as error:
        load_picture(path, SIZE, name)
    sentence = str(error.value)
    assert sentence.startswith(f"{name}={path}")
    assert "\n" not in sentence
    # One refusal, and not one about another.
    assert sentence.count(str(path)) == 1
    return sentence


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "there is no such file" in refused(tmp_path / "no.png")
    assert "there is no such file" in refused(tmp_path / "no.png", "last_image")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\0" * 5000])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert "read" in refused(path)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_a_tiny_picture_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", size))
    assert f"has {size[0]}x{size[1]} pixels" in refused(path)


@pytest.mark.parametrize("side", [8945, 10000, 15000])
def test_a_huge_picture_is_refused_by_its_header(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert side**2 > MAX_PIXELS
    path = saved(tmp_path / "a.png", Image.new("1", (side, side)))

    def decoded(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert "more than 80 million pixels" in refused(path)


@settings(max_examples=100)
@given(suffix=st.sampled_from(["png", "jpg", "webp", "gif", "tiff", "bmp"]), data=st.data())
def test_a_damaged_picture_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    path = saved(tmp_path_factory.getbasetemp() / f"damaged.{suffix}", ramp())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(RequestError):
        assert load_picture(path, SIZE).mode == "RGB"
