"""The levels: what each one's target is, and the top-down path among predictions.

Coarser is deeper is more invariant. Pooling the same output twice adds nothing, since the mean is linear and the
fine prediction already implies the coarse one; so a coarser level also reads deeper blocks, and its mean is
normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.model import FPN
from hjepa.grid import pool, refine


def spread_taps(depth: int) -> tuple[int, ...]:
    """Blocks (1 = first) at a third, two thirds and the whole of the depth."""
    return tuple(sorted({max(1, round(depth * part / 3)) for part in (1, 2, 3)}))


def taps_of_level(num_taps: int, level: int) -> slice:
    """Which of the taps a level predicts: all of them at level 0, one shallow tap fewer at each coarser level."""
    return slice(min(level, num_taps - 1), num_taps)


def level_targets(maps: Tensor, num_levels: int) -> list[Tensor]:
    """Targets of every level.

    Args:
        maps: `[..., h, w, T, D]` outputs of T taps over a rectangle of patches, before any norm.
        num_levels: L.

    Returns:
        for each level `[..., h_l, w_l, T_l, D]`: layer-normalised taps (no affine: nothing trained may touch a
        target, or it collapses), averaged over cells of 2^l x 2^l patches and normalised again.
    """
    *_, num_taps, dim = maps.shape
    normal = F.layer_norm(maps.float(), (dim,))
    levels = []
    for level in range(num_levels):
        wanted = normal[..., taps_of_level(num_taps, level), :]
        if level:
            cells = pool(wanted.flatten(-2), level)
            wanted = F.layer_norm(cells.unflatten(-1, (-1, dim)), (dim,))
        levels.append(wanted)
    return levels


class TopDown(nn.Module):
    """Feature pyramid (Lin et al. 2017) among predicted levels: each coarse map refines the next finer one."""

    def __init__(self, config: FPN, dim: int, num_levels: int) -> None:
        super().__init__()
        self.out_dim = config.feature_dim or dim
        self.lateral = nn.ModuleList(nn.Linear(dim, self.out_dim) for _ in range(num_levels))
        self.fuse = nn.ModuleList(
            nn.Linear(2 * self.out_dim, self.out_dim) if config.fusion_method == "concat" else nn.Identity()
            for _ in range(num_levels - 1)
        )
        self.concat = config.fusion_method == "concat"

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """`[n, h_l, w_l, dim]` for each level, finest first -> `[n, h_l, w_l, out_dim]` for each level."""
        above = self.lateral[-1](maps[-1])
        fused = [above]
        for level in reversed(range(len(maps) - 1)):
            here = self.lateral[level](maps[level])
            above = refine(above, here.shape[1], here.shape[2])
            above = self.fuse[level](torch.cat((here, above), dim=-1)) if self.concat else here + above
            fused.append(above)
        return fused[::-1]
