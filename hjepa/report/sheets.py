"""The page's pictures as plain images, for those who look at a run in TensorBoard or Weights & Biases."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hjepa.report.pictures import Pictures, draw
from hjepa.report.records import read_run
from hjepa.report.tiles import Tile, UInt8

_SIDE, _GAP = 128, 4
_PAPER, _SAME = (253, 253, 251), (46, 125, 79)
# As the page's style sheet has them, for cells of different blocks.
_BLOCKS = ((37, 99, 168), (201, 86, 30), (46, 133, 85), (125, 83, 168))
_SHARE = 0.38  # of a cell's colour over the picture


def sheets_of_run(path: Path) -> dict[str, UInt8]:
    """What the page of a run would show of its newest checkpoint: `[H, W, 3]` uint8 by name."""
    return sheets(draw(read_run(path, running=True)))


def sheets(pictures: Pictures) -> dict[str, UInt8]:
    """One image for the samples, one for each strip of features, one for the neighbours; those that are there."""
    found = {"views": [row for sample in pictures.samples for row in sample], "neighbours": pictures.neighbours}
    found |= {f"features/{strip.title}": [strip.tiles] for strip in pictures.features}
    return {name: _sheet(rows) for name, rows in found.items() if rows}


def _sheet(rows: Sequence[Sequence[Tile]]) -> UInt8:
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (step * max(map(len, rows)) - _GAP, step * len(rows) - _GAP), _PAPER)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(_picture(tile), (step * x, step * y))
    return np.asarray(sheet)


def _picture(tile: Tile) -> Image.Image:
    data = base64.b64decode(tile.src.partition(",")[2])
    filter_ = Image.Resampling.NEAREST if tile.sharp else Image.Resampling.LANCZOS
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((_SIDE, _SIDE), filter_)
    across, down = _SIDE / tile.grid[0], _SIDE / tile.grid[1]
    over = image.copy()
    on_image, on_over = ImageDraw.Draw(image), ImageDraw.Draw(over)
    boxes = [
        ((cell.x * across, cell.y * down, (cell.x + cell.width) * across, (cell.y + cell.height) * down), cell.colour)
        for cell in (*tile.hidden, *tile.cells)
    ]
    for box, _ in boxes[: len(tile.hidden)]:
        on_image.rectangle(box, fill=_PAPER)
    for box, colour in boxes[len(tile.hidden) :]:
        on_over.rectangle(box, fill=_BLOCKS[colour % len(_BLOCKS)], outline="white")
    if tile.cells:
        image = Image.blend(image, over, _SHARE)
    if tile.marked:
        ImageDraw.Draw(image).rectangle((0, _SIDE - 4, _SIDE, _SIDE), fill=_SAME)
    return image
