"""What a linear classifier learns from a handful of labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hjepa.evaluation.probes import accuracy
from hjepa.evaluation.ridge import Ridge
from hjepa.evaluation.task import Figure, Task
from hjepa.rng import permute

SHOTS = (1, 5, 10)
DRAWS = 5
# Fixed, relative to the number of rows: a handful of labels leaves none to choose it by.
L2 = 1.0


def few_shot(task: Task[Tensor], shots: Sequence[int] = SHOTS, draws: int = DRAWS) -> Iterator[tuple[str, Figure]]:
    """Ridge regression (`Ridge`) on k images of each class, drawn several times and asked on all of test.

    The draws are the seed's, so every encoder is shown the same images, and the first of ten are the five.

    Yields:
        `shot<k>`: mean top-1 accuracy and its standard deviation (n - 1) over the draws, for every k that each class
        has images for; see `too_few`.
    """
    for k in shots:
        if too_few(task.train_labels, task.num_classes, k):
            continue
        found = []
        for draw in range(draws):
            rows = draw_rows(task, k, draw)
            ridge = Ridge(task.train[rows], task.train_labels[rows], task.num_classes)
            (weights,) = ridge.weights([L2])
            found.append(accuracy(ridge.predict(task.test, weights), task.test_labels))
        yield f"shot{k}", Figure(float(np.mean(found)), float(np.std(found, ddof=1)) if draws > 1 else None)


def draw_rows(task: Task[Tensor], k: int, draw: int) -> Tensor:
    """k rows of train of each class, `[k num_classes]` int64, class by class."""
    drawn = []
    for label in range(task.num_classes):
        rows = torch.nonzero(task.train_labels == label)[:, 0]
        place = np.arange(k, dtype=np.int64)
        order = permute(task.seed, f"few-shot {label}", np.full(k, draw, np.int64), place, len(rows))
        drawn.append(rows[torch.from_numpy(order).to(rows.device)])
    return torch.cat(drawn)


def too_few(labels: Tensor, num_classes: int, k: int) -> str | None:
    """Why k images of each class cannot be drawn, in words; None where they can."""
    counts = torch.bincount(labels, minlength=num_classes)
    short = int((counts < k).sum())
    if not short:
        return None
    return (
        f"{short} of {num_classes} classes have fewer than {k} training images (the smallest has {int(counts.min())})"
    )
