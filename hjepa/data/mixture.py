"""Which image stands at which position of a run.

The order of a night's training is a pure function of (seed, position): no shuffled index is stored, resuming needs
one integer, and any number of workers or processes reads the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hjepa.config.data import Data
from hjepa.data.source import Source
from hjepa.rng import Int64, permute


class Mixture:
    """Sources drawn in fixed shares.

    In each epoch source s is drawn n_s times, the shares of the epoch rounded to whole numbers. Each source is
    walked through completely, in a new order each time, before any of its images returns.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], strategy: str, epoch_size: int | None, seed: int
    ) -> None:
        """Fix the shares.

        Args:
            sizes: images per source.
            weights: share of each source under the strategy `weighted`.
            strategy: `weighted`, `balanced` (equal shares) or `concat` (shares by size).
            epoch_size: samples per epoch, or None for the sum of the sizes.
            seed: of the order.
        """
        assert all(size > 0 for size in sizes)
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.epoch_size = int(epoch_size or self.sizes.sum())
        self.seed = seed
        share = {
            "weighted": np.asarray(weights, dtype=np.float64),
            "balanced": np.ones(len(sizes)),
            "concat": self.sizes.astype(np.float64),
        }[strategy]
        exact = share / share.sum() * self.epoch_size
        counts = np.floor(exact).astype(np.int64)
        # Largest remainders get what rounding down left over.
        for s in np.argsort(counts - exact, kind="stable")[: self.epoch_size - int(counts.sum())]:
            counts[s] += 1
        self.counts = counts
        self.ends = counts.cumsum()

    def locate(self, epoch: Int64, place: Int64) -> tuple[Int64, Int64]:
        """Source and index of the samples at these places of their epochs.

        Args:
            epoch: `[n]` from 0.
            place: `[n]` in [0, epoch_size).

        Returns:
            two `[n]` int64 arrays.
        """
        slot = permute(self.seed, "mixture", epoch, place, self.epoch_size)
        source = np.searchsorted(self.ends, slot, side="right").astype(np.int64)
        draw = slot - (self.ends - self.counts)[source] + epoch * self.counts[source]  # of its source, in the run
        index = np.empty_like(draw)
        for s, size in enumerate(self.sizes):
            mine = source == s
            index[mine] = permute(self.seed, f"source{s}", draw[mine] // size, draw[mine] % size, int(size))
        return source, index


def mixture_of(config: Data, sources: Sequence[Source], seed: int) -> Mixture:
    """The mixture of a run's sources, in the order of `data.datasets`."""
    weights = [dataset.weight for dataset in config.datasets]
    return Mixture([len(s) for s in sources], weights, config.sampling_strategy, config.epoch_size, seed)
