"""What a batch statistic needs to know of other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within, `gather_batch` waits for nobody: for trials that each process makes by itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def gather_batch(x: Tensor, dim: int) -> Tensor:
    """Join the processes' parts of a batch along `dim`, with gradients; alone, return `x`.

    Every process then computes the same statistic of the whole batch. The backward pass sums the processes'
    gradients into each part, and data parallelism averages over processes, so the gradient is that of one process
    holding the whole batch.
    """
    if _alone or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return torch.cat(tuple(all_gather(x.contiguous())), dim=dim)
