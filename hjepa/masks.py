"""Multi-block masks for a whole batch, by exact counts.

Each view hides `num_masks` blocks of one size; the context sees (a share of) as many patches as are left where no
two blocks overlap. The size is drawn once per step and the places once per view, so every tensor is rectangular
and nothing is padded. A block is a small feature map: its coarser levels are means over the cells inside it, which
are therefore wholly hidden on any grid, whatever the stride.

The reference sampler of I-JEPA (Assran et al. 2023) never reaches the last row and column (23 % of an 8 x 8 grid)
and cuts contexts to the shortest of the batch from the top of the image down; neither is so here. Blocks that may
not overlap were tried: four of 15-20 % pack so tightly that the middle of each quarter is never seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hjepa.config.geometry import feasible_blocks
from hjepa.config.sections import Masking
from hjepa.errors import ConfigError
from hjepa.grid import Grid
from hjepa.rng import Int64, uniform


class Masks(NamedTuple):
    """Patch numbers of what is seen and what is hidden.

    Attributes:
        context: `[B, Nc]` int64, ascending.
        targets: `[B, M, h, w]` int64, the hidden blocks; disjoint from the context, not from each other. M may be 0.
    """

    context: Tensor
    targets: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Masks:
        """The same masks on another device."""
        return Masks(*(t.to(device, non_blocking=non_blocking) for t in self))


class BlockMasks:
    """Draws masks as a function of (seed, step, stream, position).

    Raises:
        ConfigError: when no block satisfies the settings; the config's own checks say so first and with more words.
    """

    def __init__(self, config: Masking, grid: Grid, num_levels: int) -> None:
        self.config = config
        self.grid = grid
        min_side = 2 ** (num_levels - 1)
        size = grid.height, grid.width
        # Of no blocks, one size is as good as any.
        self.blocks = [(1, 1)]
        if config.num_masks:
            scale, ratio = config.mask_scale, config.aspect_ratio
            self.blocks = feasible_blocks(*size, config.num_masks, scale, ratio, min_side)
        if not self.blocks:
            raise ConfigError(f"masking: no block satisfies {config} on a {grid.height} x {grid.width} grid")

    def geometry(self, seed: int, step: int) -> tuple[tuple[int, int], int]:
        """The block (h, w) of a step and the number of context patches: one for all views, so that they stack."""
        which, share = uniform(seed, "masks/geometry", np.asarray([step]), 2)[0]
        block = self.blocks[int(which * len(self.blocks))]
        low, high = self.config.context_scale
        return block, self.num_context(block, low + share * (high - low))

    def num_context(self, block: tuple[int, int], share: float) -> int:
        """Patches that a context sees: a share of what is left where no two blocks (h, w) overlap."""
        return max(1, round(share * (self.grid.size - self.config.num_masks * block[0] * block[1])))

    def sample(self, seed: int, step: int, stream: str, positions: Int64) -> Masks:
        """Masks for the samples at these positions of the run.

        Args:
            seed: the run's seed.
            step: optimizer step, the address of the block's size.
            stream: which view, say; two streams are independent.
            positions: `[B]` the address of each row.
        """
        (h, w), num_context = self.geometry(seed, step)
        num_masks = self.config.num_masks
        top, left = np.split(uniform(seed, f"{stream}/place", positions, 2 * num_masks), 2, axis=1)
        rows = (top * (self.grid.height - h + 1)).astype(np.int64)[:, :, None, None] + np.arange(h)[:, None]
        columns = (left * (self.grid.width - w + 1)).astype(np.int64)[:, :, None, None] + np.arange(w)
        targets = rows * self.grid.width + columns  # [B, M, h, w]

        # The context is the num_context smallest of random keys; hidden patches have keys no other reaches.
        keys = uniform(seed, f"{stream}/context", positions, self.grid.size)
        np.put_along_axis(keys, targets.reshape(len(positions), -1), 2.0, axis=1)
        context = np.sort(np.argpartition(keys, num_context - 1, axis=1)[:, :num_context], axis=1)
        return Masks(torch.from_numpy(context.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))
