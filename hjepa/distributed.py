"""What one process needs to know of the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

T = TypeVar("T")

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
    if _is_one():
        return x
    return torch.cat(tuple(all_gather(x.contiguous())), dim=dim)


def gather_objects(items: list[T]) -> list[T]:
    """Join the processes' lists, in the order of the processes; every process calls it and gets the whole."""
    if _is_one():
        return items
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def _is_one() -> bool:
    return _alone or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
