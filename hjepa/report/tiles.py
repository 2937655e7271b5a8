"""Small pictures for the page, each with the words that stand for it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hjepa.config.data import Augmentation

UInt8 = NDArray[np.uint8]

# Up to this side a picture is kept as it is and its pixels are shown; larger ones are photographs, and need no more
# than LARGEST.
SMALL, LARGEST = 72, 192


class Rect(NamedTuple):
    """A cell on a picture, in patches; its colour by number."""

    x: float
    y: float
    width: float
    height: float
    colour: int = 0


@dataclass(frozen=True)
class Tile:
    """A picture with its words.

    Attributes:
        src: data URI.
        alt: what it shows.
        caption: what stands below it.
        sharp: whether its pixels are shown as squares.
        grid: width and height in patches, the units of `hidden` and `cells`.
        hidden: patches that are covered.
        cells: cells that are outlined.
        marked: whether it stands out among its neighbours.
    """

    src: str
    alt: str
    caption: str = ""
    sharp: bool = False
    grid: tuple[int, int] = (1, 1)
    hidden: tuple[Rect, ...] = ()
    cells: tuple[Rect, ...] = ()
    marked: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of pictures under a heading, with a note on what they show."""

    title: str
    note: str
    tiles: list[Tile]


def pixels_of(images: Tensor, normalised: Augmentation) -> UInt8:
    """Normalised `[n, 3, h, w]` float32 -> `[n, h, w, 3]` uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (normalised.mean, normalised.std))
    pixels: UInt8 = ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels


def tile_of(pixels: UInt8, alt: str, caption: str = "", marked: bool = False) -> Tile:
    """A picture `[h, w, 3]` uint8 as a tile."""
    image, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    sharp = max(image.size) <= SMALL
    if sharp:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
    kind = "png" if sharp else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return Tile(f"data:image/{kind};base64,{data}", alt, caption, sharp, marked=marked)
