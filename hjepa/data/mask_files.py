"""Masks of images in a folder of their own: PNG files whose pixels are numbers of classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from hjepa.data.decode import MAX_PIXELS, ImageError, true_size
from hjepa.data.files import FileSource
from hjepa.data.source import Int64, UInt8
from hjepa.errors import DataError

IGNORED = 255
"""A pixel that belongs to no class."""

_MODES = ("1", "L", "P", "I", "I;16")


class MaskFiles:
    """A mask for every image of a folder: `images/a/b.jpg` has `masks/a/b.png`.

    Args:
        images: the files.
        root: the folder that their names are relative to.
        masks: the folder of masks.

    Raises:
        DataError: naming the first image without a mask, or the first mask that is not of its image's size or holds
            something else than numbers of classes.
    """

    def __init__(self, images: FileSource, root: Path, masks: Path) -> None:
        if not masks.is_dir():
            raise DataError(f"--masks {masks}: no such folder")
        top = str(root.expanduser().absolute())
        self._paths = [masks / Path(os.path.relpath(path, top)).with_suffix(".png") for path in images.paths]
        for image, mask in zip(images.paths, self._paths, strict=True):
            if not mask.is_file():
                raise DataError(f"{image}: has no mask (looked for {mask})")
            try:
                height, width = true_size(image)
            except ImageError:  # another image stands for it, with that one's mask
                continue
            with _opened(mask) as there:
                if there.size != (width, height):
                    raise DataError(
                        f"{mask}: {there.height} x {there.width} pixels, and its image {image} has {height} x {width}; "
                        "a mask has the size of its image"
                    )

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, indices: Int64, side: int) -> UInt8:
        """The largest centred square of each mask: `[n]` -> `[n, side, side]` uint8 classes, `IGNORED` for none."""
        out = np.empty((len(indices), side, side), np.uint8)
        for row, index in enumerate(indices):
            with _opened(self._paths[index]) as image:
                short = min(image.size)
                left, top = (image.width - short) / 2, (image.height - short) / 2
                plain = _numbers(image, self._paths[index])
                box = (left, top, left + short, top + short)
                out[row] = np.asarray(plain.resize((side, side), Image.Resampling.NEAREST, box=box))
        return out


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in _MODES:
                raise DataError(
                    f"{path}: a mask is a PNG of class numbers, one channel; this one is in colour ({image.mode})"
                )
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} million"
                )
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a PNG ({' '.join(str(error).split())})") from None


def _numbers(image: Image.Image, path: Path) -> Image.Image:
    """Pixel values as 8 bits; of a palette its indices."""
    values = np.asarray(image)
    if values.dtype != np.uint8:
        if values.size and int(values.max()) > IGNORED:
            raise DataError(f"{path}: holds the class {int(values.max())}; classes are 0 to 254, {IGNORED} is ignored")
        values = values.astype(np.uint8)
    return Image.fromarray(values)
