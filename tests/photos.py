"""A folder of images in four formats and sizes, for the tests of what is done with folders."""

from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = (("a.jpg", (70, 50)), ("b.png", (40, 90)), ("deep/c.webp", (64, 64)), ("deep/d.bmp", (33, 47)))


def make_photos(folder: Path) -> list[Path]:
    """Images of four formats and sizes: smooth, so that a JPEG loses little."""
    paths = []
    for number, (name, size) in enumerate(PHOTOS):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths
