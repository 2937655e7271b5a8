"""The grid of patches and its coarser grids.

A rectangle of tokens is a feature map: pooling and refining happen in two dimensions, never along a flattened
list, where the last patch of one row and the first of the next would be neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """`height` x `width` patches, numbered row by row."""

    height: int
    width: int

    @classmethod
    def of(cls, image_size: int, patch_size: int) -> Grid:
        """The grid of a square image."""
        assert image_size % patch_size == 0
        return cls(image_size // patch_size, image_size // patch_size)

    @property
    def size(self) -> int:
        """Number of patches."""
        return self.height * self.width

    def coordinates(self, indices: Tensor) -> Tensor:
        """Patch numbers `[...]` -> row and column `[..., 2]` float32."""
        return torch.stack((indices // self.width, indices % self.width), dim=-1).float()


def cells(height: int, width: int, level: int) -> tuple[int, int]:
    """Rows and columns of whole cells of 2^level x 2^level patches in a rectangle of patches."""
    return height >> level, width >> level


def pool(maps: Tensor, level: int) -> Tensor:
    """Mean over cells of 2^level x 2^level.

    Args:
        maps: `[..., h, w, D]`.
        level: 0 returns `maps`.

    Returns:
        `[..., h', w', D]` with `(h', w') = cells(h, w, level)`. What does not fill a whole cell is left out, half
        on either side.
    """
    if level == 0:
        return maps
    *lead, h, w, _ = maps.shape
    rows, columns = cells(h, w, level)
    stride = 1 << level
    top, left = (h - rows * stride) // 2, (w - columns * stride) // 2
    whole = maps[..., top : top + rows * stride, left : left + columns * stride, :]
    return whole.reshape(*lead, rows, stride, columns, stride, -1).mean(dim=(-4, -2))


def refine(maps: Tensor, height: int, width: int) -> Tensor:
    """Bilinear upsampling of a coarser map: `[n, h', w', D]` -> `[n, height, width, D]`."""
    channels_first = maps.permute(0, 3, 1, 2)
    up = F.interpolate(channels_first, size=(height, width), mode="bilinear", align_corners=False)
    return up.permute(0, 2, 3, 1)


def sine_positions(coordinates: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine-cosine embedding of continuous places (Vaswani et al. 2017, one half of the width per axis).

    Continuous, so that the centre of a coarse cell has an embedding just as a patch has.

    Args:
        coordinates: `[..., 2]` row and column in units of patches.
        dim: width of the embedding, a multiple of 4.

    Returns:
        `[..., dim]` float32.
    """
    assert dim % 4 == 0
    exponent = torch.arange(dim // 4, device=coordinates.device, dtype=torch.float32) / (dim // 4)
    angles = coordinates.float().unsqueeze(-1) * temperature**-exponent  # [..., 2, dim / 4]
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)
