"""The run's first images as its first step saw them: views, what the context sees, the cells of each level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from hjepa.build import grid_of
from hjepa.config import Config
from hjepa.data.loader import Batches
from hjepa.data.source import Source
from hjepa.data.views import Views, draw_views
from hjepa.grid import Grid, cells
from hjepa.masks import BlockMasks, Masks
from hjepa.report.tiles import Rect, Tile, pixels_of, tile_of

NUM_SAMPLES = 4


def samples_of(config: Config, sources: list[Source]) -> list[list[list[Tile]]]:
    """Of each sample a row for each view, and one for its local crops.

    Args:
        config: of the run.
        sources: what it trains on.

    Raises:
        DataError: when the images cannot be read.
    """
    grid, levels = grid_of(config), config.model.num_hierarchies
    batches = Batches(config.data, sources, BlockMasks(config.masking, grid, levels), config.experiment.seed)
    return [list(_rows_of(config, batches, p)) for p in range(min(NUM_SAMPLES, batches.batch_size))]


def _rows_of(config: Config, batches: Batches, position: int) -> Iterator[list[Tile]]:
    """The views of one position of the run, then its crops."""
    data, seed, where = config.data, config.experiment.seed, np.asarray([position], np.int64)
    (source,), index = batches.locate(where)
    read = batches.sources[source].read(index)
    image, name = torch.from_numpy(read.images), f"sample {position + 1}"
    views = Views(data.augmentation, data.image_size)
    for view in range(data.num_views):
        stream = f"view{view}"
        drawn = draw_views(data.augmentation, seed, stream, where, read.true_sizes)
        (pixels,) = pixels_of(views(image, drawn), data.augmentation)
        tile = tile_of(pixels, f"{name}, view {view + 1}", f"view {view + 1}")
        yield [tile, *_masked(config, tile, batches.masks.sample(seed, 0, stream, where), name)]
    if data.multicrop.num_local_crops:
        crops = Views(data.augmentation, data.local_size(config.model.shape.patch_size))
        row = []
        for crop in range(data.multicrop.num_local_crops):
            drawn = draw_views(batches.local, seed, f"crop{crop}", where, read.true_sizes)
            (pixels,) = pixels_of(crops(image, drawn), data.augmentation)
            row.append(tile_of(pixels, f"{name}, local crop {crop + 1}", f"crop {crop + 1}"))
        yield row


def _masked(config: Config, view: Tile, masks: Masks, name: str) -> Iterator[Tile]:
    """What the context encoder sees of a view, and what each level predicts."""
    grid = grid_of(config)
    seen = set(masks.context[0].tolist())
    hidden = tuple(Rect(i % grid.width, i // grid.width, 1, 1) for i in range(grid.size) if i not in seen)
    size = grid.width, grid.height
    said = f"{name}: {len(seen)} of {grid.size} patches are visible"
    yield replace(view, alt=said, caption="context", grid=size, hidden=hidden)
    for level in range(config.model.num_hierarchies if config.loss.predicts else 0):
        drawn = tuple(_cells(grid, masks, level))
        said = f"{name}: {len(drawn)} cells of level {level} are predicted"
        yield replace(view, alt=said, caption=f"level {level}", grid=size, cells=drawn)


def _cells(grid: Grid, masks: Masks, level: int) -> Iterator[Rect]:
    """Cells of a level in each hidden block; in its middle where they do not fill it."""
    stride = 1 << level
    for number, block in enumerate(masks.targets[0]):
        height, width = block.shape
        rows, columns = cells(height, width, level)
        top, left = divmod(int(block[0, 0]), grid.width)
        top, left = top + (height - rows * stride) // 2, left + (width - columns * stride) // 2
        for i in range(rows * columns):
            yield Rect(left + i % columns * stride, top + i // columns * stride, stride, stride, number)
