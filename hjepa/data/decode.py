"""One image file -> one square uint8 array."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from hjepa.data.source import UInt8
from hjepa.errors import DataError

MAX_PIXELS = 100_000_000

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_GREY = (128, 128, 128, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns from 89 megapixels on; the limit here is ours and refuses. Of damaged files it warns and logs at each
# read, without their name; here they are read as far as they go, or refused.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageError(DataError):
    """A file that cannot be read as an image.

    Attributes:
        path: of the file.
        reason: in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.path, self.reason)


def decode(path: str | os.PathLike[str], side: int, out: UInt8 | None = None) -> tuple[UInt8, tuple[int, int]]:
    """Read an image, turn it upright and squeeze it to a square.

    Transparent parts lie on mid-grey, an animation is its first frame, more than 8 bits per channel are
    scaled down to 8.

    Args:
        path: a JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM file.
        side: of the square in pixels.
        out: `[3, side, side]` uint8 to write into; made when not given.

    Returns:
        `[3, side, side]` uint8 RGB, and the (height, width) of the upright image before squeezing.

    Raises:
        ImageError: the file is missing, damaged, of another format, or larger than `MAX_PIXELS`.
        DataError: no file can be read here now.
    """
    with _open(path) as image:
        return _squeeze(image, _orientation(image), side, out)


def decode_image(image: Image.Image, side: int, name: str) -> tuple[UInt8, tuple[int, int]]:
    """What `decode` does, to an image that is open; messages call it `name`."""
    with _explained(name):
        _refuse_if_huge(image)
        # Of a copy: a file that is open and not read yet would be decoded small, and stay so.
        return _squeeze(image.copy(), _orientation(image), side, None)


def _squeeze(image: Image.Image, orientation: int, side: int, out: UInt8 | None) -> tuple[UInt8, tuple[int, int]]:
    height, width = _upright_size(image, orientation)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the cost; the rest is filtered.
    drafted = image.draft(None, (side, side))
    rgb = _to_rgb(image)
    # reducing_gap averages whole pixels first; from 3 on the result is that of the filter alone.
    rgb = rgb.resize((side, side), Image.Resampling.BICUBIC, box=drafted[1] if drafted else None, reducing_gap=3.0)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    out = np.empty((3, side, side), np.uint8) if out is None else out
    out[:] = np.asarray(rgb).transpose(2, 0, 1)
    return out, (height, width)


def true_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of the upright image, from the file's header alone; raises as `decode` does."""
    with _open(path) as image:
        return _upright_size(image, _orientation(image))


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    with _explained(os.fspath(path)), Image.open(path, formats=_FORMATS) as image:
        _refuse_if_huge(image)
        yield image


def _refuse_if_huge(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} million")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    # On damaged files Pillow raises nearly anything: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(f"{name}: {error.strerror}; raise the limit (ulimit -n)") from error
        raise ImageError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    """In one line and without the path."""
    if isinstance(error, UnidentifiedImageError):
        return f"empty, or not one of {', '.join(_FORMATS)}"
    told = error.strerror if isinstance(error, OSError) else None
    return told or " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    # A TIFF is turned by Pillow itself as it loads. For a PNG it is the method of the base class: its own
    # decodes the whole file to look for a tag behind the pixels.
    if isinstance(image, TiffImageFile):
        return 1
    orientation: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(image))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _GREY), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> UInt8:
    """`[height, width]` of one deep channel: 16 bits by their range, wider ones by the image's own."""
    values = np.array(image, dtype=np.float32)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high < 2**16:
        low, high = 0.0, 2.0**16 - 1
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    values -= low
    values *= 255 / ((high - low) or 1.0)
    return np.rint(values).astype(np.uint8)
