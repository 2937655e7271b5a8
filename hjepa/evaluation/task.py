"""What a probe of whole images is given, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hjepa.rng import permute

Shown = TypeVar("Shown")


class Task(NamedTuple, Generic[Shown]):
    """Labelled images in some form: a part to learn from, and a part that is asked.

    Attributes:
        train, test: n and m of them by their number. Of pooled features `[n, d]` and `[m, d]` float32 on one device,
            without the mean of train; else what the probe says.
        train_labels, test_labels: `[n]` and `[m]` int64 in [0, num_classes).
        num_classes: number of classes.
        seed: of whatever a probe draws: the same images and starts for every encoder.
    """

    train: Shown
    train_labels: Tensor
    test: Shown
    test_labels: Tensor
    num_classes: int
    seed: int


@dataclass(frozen=True)
class Figure:
    """One result of a probe.

    Attributes:
        value: in percent, where nothing else is said.
        spread: standard deviation over draws, where there are several.
        chosen: what was settled on a part of train, by name.
    """

    value: float
    spread: float | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)


def held_out(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A fifth of train on which a probe chooses its settings, and the rest on which it is fitted meanwhile.

    Returns:
        two disjoint `[...]` int64 of row numbers; the first is empty for n < 5.
    """
    every = np.arange(n, dtype=np.int64)
    order = permute(seed, "linear probe", np.zeros_like(every), every, max(n, 1))
    choice, fit = torch.from_numpy(order).tensor_split([n // 5])
    return choice, fit
