"""What `hjepa classify` leaves: a table, and a page with the classifier's worth and pictures by class."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hjepa.config.data import Data
from hjepa.data.decode import ImageError, decode
from hjepa.data.views import center_views, plain_views
from hjepa.replacing import replacing
from hjepa.report.page import render
from hjepa.report.tiles import Tile, pixels_of, tile_of

# A page of so many pictures has about a megabyte.
_PICTURES, _FIRST, _LEAST = 200, 12, 6
_SQUEEZED, _SIDE = 128, 96


_COLUMNS = ("file", "predicted", "probability", "label")


class Prediction(NamedTuple):
    """What was said of an image.

    Attributes:
        path: of its file.
        name: as the table has it.
        predicted: name of the class.
        probability: of that class.
        label: what it was labelled as by hand, "" for most.
    """

    path: str
    name: str
    predicted: str
    probability: float
    label: str


@dataclass(frozen=True)
class Worth:
    """What stands at the head of the page.

    Attributes:
        run: name of the run.
        counts: what was labelled, in words.
        rows: of the table: name, accuracy, spread over repeats, interval.
    """

    run: str
    counts: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Group:
    """Images of one predicted class.

    Attributes:
        title: the class.
        count: how many there are.
        tiles: the least certain of them.
    """

    title: str
    count: int
    tiles: list[Tile]


def write_table(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write `file,predicted,probability,label`, a row for each image.

    Raises:
        StorageError: when it cannot be written.
    """
    rows = ((one.name, one.predicted, f"{one.probability:.4f}", one.label) for one in predictions)
    with replacing(path) as new, new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *rows])


def is_table(path: Path) -> bool:
    """Whether a file begins as `write_table` begins it."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            return file.readline().rstrip() == ",".join(_COLUMNS)
    except OSError:
        return False


def write_page(path: Path, worth: Worth, predictions: Sequence[Prediction], data: Data) -> None:
    """Write a page that needs no network and no other file.

    Args:
        path: of the page.
        worth: its head.
        predictions: all of them.
        data: the section of the run, whose centre squares are shown.

    Raises:
        StorageError: when it cannot be written.
    """
    fresh = sorted((one for one in predictions if not one.label), key=lambda one: one.probability)
    labelled = sorted((one for one in predictions if one.label), key=lambda one: -one.probability)
    shown = fresh or labelled[::-1]
    names = sorted({one.predicted for one in shown})
    each = max(_LEAST, _PICTURES // max(1, len(names)))
    groups = []
    for name in names[: _PICTURES // _LEAST]:
        members = [one for one in shown if one.predicted == name]
        groups.append(Group(name, len(members), _tiles(members[:each], data)))
    doubtful = [one for one in labelled if one.predicted != one.label]
    text = render(
        "predictions.html",
        title=f"{len(predictions)} images classified",
        by="hjepa classify",
        worth=worth,
        num_labelled=len(labelled),
        unlabelled=bool(fresh),
        next=_tiles(fresh[:_FIRST], data, True) if len(fresh) > _FIRST else [],
        groups=groups,
        left_out=len(names) - len(groups),
        doubtful=_tiles(doubtful[:_FIRST], data, True),
        num_doubtful=len(doubtful),
    )
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # a name may be any bytes


def _tiles(predictions: Iterable[Prediction], data: Data, named: bool = False) -> list[Tile]:
    """The centre square of each, as the encoder saw it; files that have gone since are left out.

    Args:
        predictions: of the images.
        data: see `write_page`.
        named: whether the file's name stands below it.
    """
    views, tiles = plain_views(data.augmentation, _SIDE), []
    for one in predictions:
        try:
            pixels, size = decode(one.path, _SQUEEZED)
        except ImageError:
            continue
        square = views(torch.from_numpy(pixels)[None], center_views(np.asarray([size], np.float32)))
        (shown,) = pixels_of(square, data.augmentation)
        said = f"{one.predicted} {100 * one.probability:.0f} %"
        caption = f"{said}, labelled {one.label}" if one.label else said
        tiles.append(tile_of(shown, one.name, f"{caption}: {one.name}" if named else caption))
    return tiles
