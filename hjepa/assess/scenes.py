"""Images with a class for every pixel: those of a source that knows, or a folder of images and one of masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.assess.pictures import Pictures
from hjepa.config.data import Data
from hjepa.data.files import FolderSource
from hjepa.data.mask_files import IGNORED, MaskFiles
from hjepa.data.source import Int64, Source
from hjepa.data.sources import decode_side
from hjepa.errors import DataError
from hjepa.evaluation.chosen import Part, Probe
from hjepa.evaluation.dense import NUM_TEST, NUM_TRAIN
from hjepa.evaluation.segmentation import Scenes
from hjepa.rng import permute

# Of images as float32, on the device: enough for those that shapes draws.
HELD_UP_TO = 1 << 28


@dataclass(frozen=True)
class Segmented:
    """What a probe of patches learns from and is asked.

    Attributes:
        train, test: see `Scenes`.
        num_classes: number of classes, background included.
        sources: where images are read.
    """

    train: Scenes
    test: Scenes
    num_classes: int
    sources: list[Source]


def of_source(pair: Probe, data: Data, seed: int, device: torch.device) -> Segmented:
    """A labelled source that has masks: class 0 is background, label c is class c + 1."""

    def scenes(source: Source, limit: int) -> Scenes:
        rows = np.arange(min(limit, len(source)), dtype=np.int64)
        pictures = Pictures(Part([source], [rows], [0]), data, seed, device)

        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            images, used = pictures.read(rows)
            masks, labels = source.masks(used), source.labels
            assert masks is not None
            assert labels is not None
            classes = torch.from_numpy(masks) * (torch.from_numpy(labels[used]) + 1)[:, None, None]
            return images, F.interpolate(classes[:, None].float(), data.image_size, mode="nearest-exact")[:, 0].byte()

        return _held(Scenes(len(rows), read), data.image_size)

    train, test = pair
    return Segmented(scenes(train, NUM_TRAIN), scenes(test, NUM_TEST), train.num_classes + 1, [train, test])


def of_folders(
    images: Path, masks: Path, data: Data, seed: int, device: torch.device, most: tuple[int, int]
) -> Segmented:
    """A folder of images and one of masks with the same names: divided into train/ and val/ (or test/), or not.

    Where they are not divided, a tenth of the images, always the same, is held out.

    Args:
        images, masks: the folders; `images/a/b.jpg` has `masks/a/b.png`.
        data: how files are kept and shown.
        seed: of which images are looked at where there are more than `most`.
        device: where views are drawn.
        most: images to learn from, and to ask.

    Raises:
        DataError: in one line, for what is missing or does not fit.
    """
    names = [_part(images, ("train",)), _part(images, ("val", "test"))]
    if names[0] is None:
        names = [".", "."]
    elif names[1] is None:
        raise DataError(f"{images}: has train/ but no val/ or test/ with images to ask")
    sides = []
    for number, name in enumerate(names):
        folder = images / str(name)
        source = FolderSource(folder, decode_side(data), str(folder), data.max_bad_fraction)
        rows = np.arange(len(source), dtype=np.int64)
        if name == ".":
            rows = _held_out(len(source), number == 1)
        sides.append((source, MaskFiles(source, folder, masks / str(name)), _some(rows, most[number], seed, number)))
    if not all(len(rows) for *_, rows in sides):
        raise DataError(f"{images}: at least two images are needed, one to learn from and one to ask")
    found = sorted(set().union(*(_classes(files, rows, data.image_size) for _, files, rows in sides)))
    if len(found) < 2:
        told = f"of one class ({found[0]})" if found else "ignored"
        raise DataError(
            f"{masks}: all pixels are {told}; {IGNORED} means ignored, so a lone object is written as 1 on 0"
        )
    train, test = (_scenes(source, files, rows, data, seed, device) for source, files, rows in sides)
    return Segmented(train, test, found[-1] + 1, [source for source, *_ in sides])


def _part(root: Path, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if (root / name).is_dir()), None)


def _held_out(n: int, asked: bool) -> Int64:
    """A tenth of n images (one at least, of two or more), or the rest; ascending."""
    count = max(1, n // 10) if n > 1 else 0
    tenth = permute(0, "hold-out of masks", np.zeros(count, np.int64), np.arange(count), max(n, 1))
    mine = np.full(n, not asked)
    mine[tenth] = asked
    return np.flatnonzero(mine)


def _some(rows: Int64, most: int, seed: int, number: int) -> Int64:
    """At most so many of the rows, in their order."""
    if len(rows) <= most:
        return rows
    place = np.arange(most, dtype=np.int64)
    return np.sort(rows[permute(seed, f"images with masks {number}", np.zeros_like(place), place, len(rows))])


def _classes(files: MaskFiles, rows: Int64, side: int) -> set[int]:
    found: set[int] = set()
    for start in range(0, len(rows), 256):
        found.update(np.unique(files.read(rows[start : start + 256], side)).tolist())
    return found - {IGNORED}


def _scenes(source: FolderSource, files: MaskFiles, rows: Int64, data: Data, seed: int, device: torch.device) -> Scenes:
    pictures = Pictures(Part([source], [rows], [0]), data, seed, device)

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        images, used = pictures.read(rows)
        return images, torch.from_numpy(files.read(used, data.image_size))

    return _held(Scenes(len(rows), read), data.image_size)


def _held(scenes: Scenes, side: int) -> Scenes:
    """Kept in memory where they fit: every subject and feature looks at them again."""
    if 4 * 3 * side**2 * scenes.size > HELD_UP_TO or not scenes.size:
        return scenes
    parts = [scenes.read(rows) for rows in torch.split(torch.arange(scenes.size), 64)]
    images, maps = (torch.cat(found) for found in zip(*parts, strict=True))
    return Scenes(scenes.size, lambda rows: (images[rows.to(images.device)], maps[rows]))
