"""What an encoder makes of images, for the eye: colours, likeness to the embedding, neighbours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.evaluation import probes
from hjepa.model.backbone import Encoded
from hjepa.model.hjepa import HJEPA
from hjepa.model.pyramid import level_targets
from hjepa.report.tiles import Strip, Tile, UInt8, tile_of

CLIP = 0.02  # share of the values at either end that a colour does not tell apart


def colours_of(maps: Tensor) -> tuple[UInt8, float]:
    """The first three principal components over all images as red, green and blue.

    Args:
        maps: `[n, h, w, D]` float.

    Returns:
        `[n, h, w, 3]` uint8, and the share of the variance that the three hold. Signs are fixed: the largest weight
        of a component is positive.
    """
    rows = maps.flatten(0, 2).double()
    rows = rows - rows.mean(dim=0)
    _, values, weights = torch.linalg.svd(rows, full_matrices=False)
    weights = weights[:3] * weights[:3].gather(1, weights[:3].abs().argmax(1, keepdim=True)).sign()
    places = F.pad(rows @ weights.T, (0, 3 - len(weights)))
    ends = torch.quantile(places, torch.tensor([CLIP, 1 - CLIP], dtype=places.dtype), dim=0)
    shades = ((places - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-12)).clamp(0, 1)
    energy = values.square()
    share = float(energy[:3].sum() / energy.sum().clamp_min(1e-30))
    colours: UInt8 = (shades * 255).round().byte().unflatten(0, maps.shape[:3]).numpy()
    return colours, share


def likeness(tokens: Tensor) -> Tensor:
    """Cosine of each patch's token with the embedding, which is their mean.

    Without the mean over all images, as probes compare embeddings: what all images share says nothing of one.

    Args:
        tokens: `[n, N, D]` float.

    Returns:
        `[n, N]` in [-1, 1].
    """
    centred = tokens - tokens.mean(dim=(0, 1))
    return F.cosine_similarity(centred, centred.mean(dim=1, keepdim=True), dim=-1)


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities `[m, k]` and rows `[m, k]` of the nearest of a bank, both without the bank's mean.

    Args:
        queries: `[m, D]` float.
        bank: `[n, D]` float.
        k: how many, at most n.
    """
    mean = bank.mean(dim=0)
    return probes.nearest(bank - mean, queries - mean, k)


def feature_strips(model: HJEPA, encoded: Encoded) -> list[Strip]:
    """A row of pictures for each level, for the final tokens, and for what is like the embedding."""
    from matplotlib import colormaps  # a third of a second, which no run should pay at its start

    shape = model.grid.height, model.grid.width
    maps = torch.stack(encoded.taps, dim=2).unflatten(1, shape)
    strips = []
    for level, targets in enumerate(level_targets(maps, model.num_levels)):
        _, rows, columns, *_ = targets.shape
        strips.append(_coloured(f"Level {level}", f"{rows} x {columns} cells", targets.flatten(-2)))
    strips.append(_coloured("Final tokens", "", encoded.tokens.unflatten(1, shape)))
    alike = likeness(encoded.tokens).unflatten(1, shape)
    low, high = float(alike.min()), float(alike.max())
    shades = (colormaps["viridis"](((alike - low) / max(high - low, 1e-9)).numpy())[..., :3] * 255).astype(np.uint8)
    tiles = [
        _tile(shade, f"image {i + 1}: cosine from {float(values.min()):.2f} to {float(values.max()):.2f}")
        for i, (shade, values) in enumerate(zip(shades, alike, strict=True))
    ]
    note = (
        f"cosine of each patch with the mean of all patches, which is the embedding: dark {low:.2f}, bright {high:.2f}"
    )
    return [*strips, Strip("Likeness to the embedding", note, tiles)]


def _coloured(title: str, size: str, maps: Tensor) -> Strip:
    colours, share = colours_of(maps)
    note = f"three directions hold {100 * share:.0f} % of the variance"
    tiles = [_tile(picture, f"image {i + 1}: {title.lower()} as colour") for i, picture in enumerate(colours)]
    return Strip(title, f"{size}; {note}" if size else note, tiles)


def _tile(cells: UInt8, alt: str) -> Tile:
    """One pixel for each cell."""
    return tile_of(cells, alt)
