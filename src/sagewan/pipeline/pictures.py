"""Input pictures: any readable file → an RGB picture with the proportions of the video."""

import warnings
import zlib
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from sagewan.errors import RequestError

# Pillow knows more, some of which run other programs (EPS) or are hardly tested.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
MIN_SIDE = 16
# Below the 89 million at which Pillow begins to warn of decompression bombs.
MAX_PIXELS = 80_000_000
_TO_8_BIT = [round(value / 257) for value in range(65536)]


def load_picture(path: Path, size: tuple[int, int], name: str = "image") -> Image.Image:
    """As :func:`open_picture`, cropped about its centre to the proportions of ``size``, not yet
    resized."""
    return _cropped(open_picture(path, name), size)


def open_picture(path: Path, name: str = "image") -> Image.Image:
    """An RGB picture.

    Turned as its EXIF says; what is transparent shows white; 16-bit grey is scaled to 8; of an
    animation, the first frame. Raises RequestError, naming the request's field, if the file is
    missing or no picture, has a side below 16 pixels, or has more than 80 million pixels: its
    size is read from its header, before it is decoded.
    """
    try:
        # Pillow warns of size at 89 million pixels and of odd tags: the one is refused here, and
        # the other does no harm.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(path, formats=FORMATS) as picture,
        ):
            _check_size(picture.size, path, name)
            return _rgb(ImageOps.exif_transpose(picture))
    except RequestError:
        raise
    except FileNotFoundError:
        raise RequestError(f"{name}={path}: there is no such file") from None
    except IsADirectoryError:
        raise RequestError(f"{name}={path} is a folder: name a picture in it") from None
    except Image.DecompressionBombError:
        raise _too_large(path, name) from None
    except UnidentifiedImageError:
        raise RequestError(
            f"{name}={path} is not a picture that can be read: use PNG, JPEG or WebP"
        ) from None
    # Pillow's decoders raise any of these for a damaged file.
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:
        raise RequestError(f"{name}={path} is damaged or can't be read ({error})") from None


def _check_size(size: tuple[int, int], path: Path, name: str) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise RequestError(
            f"{name}={path} has {width}x{height} pixels: give a picture of at least "
            f"{MIN_SIDE}x{MIN_SIDE}"
        )
    if width * height > MAX_PIXELS:
        raise _too_large(path, name)


def _too_large(path: Path, name: str) -> RequestError:
    return RequestError(
        f"{name}={path} has more than {MAX_PIXELS // 10**6} million pixels: make it smaller first"
    )


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion to 8 bit clips it instead of scaling.
        return picture.convert("I").point(_TO_8_BIT, "L").convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _cropped(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part about the centre with the proportions of ``size``, to whole pixels."""
    width, height = picture.size
    across, down = size
    if width * down == height * across:
        return picture
    new_width = min(width, max(1, round(height * across / down)))
    new_height = min(height, max(1, round(width * down / across)))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return picture.crop((left, top, left + new_width, top + new_height))
