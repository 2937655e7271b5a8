"""Whether classes are clusters: k-means without labels, compared with them afterwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.evaluation.task import Figure, Task
from hjepa.rng import scalar_seed

RESTARTS = 5
ITERATIONS = 50
_ROW_BLOCK = 4096


def clusters(task: Task[Tensor], restarts: int = RESTARTS) -> Figure:
    """Normalised mutual information of labels and clusters, in percent.

    As many clusters as classes are found among the training images, as directions (rows of length 1), and each test
    image belongs to the nearest centre. Labels are looked at afterwards, for the comparison alone.
    """
    train, test = F.normalize(task.train.float(), dim=1), F.normalize(task.test.float(), dim=1)
    centres = kmeans(train, min(task.num_classes, len(train)), task.seed, restarts)
    assigned, _ = _assign(test, centres[None])
    return Figure(100 * normalised_mutual_information(assigned[0], task.test_labels))


def kmeans(points: Tensor, k: int, seed: int, restarts: int = RESTARTS, iterations: int = ITERATIONS) -> Tensor:
    """Lloyd's algorithm from `restarts` starts at once; the best of them by the sum of squared distances.

    Args:
        points: `[n, d]` float32, n >= k.
        k: number of clusters.
        seed: of the starts (k-means++, Arthur and Vassilvitskii 2007).
        restarts: how many.
        iterations: at most so many; it ends when nothing changes.

    Returns:
        centres `[k, d]` float32.
    """
    return lloyd(points, _starts(points, k, seed, restarts), iterations)


def lloyd(points: Tensor, centres: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Move centres to the means of what is nearest to them until none moves.

    Args:
        points: `[n, d]` float32.
        centres: `[R, k, d]` to start from. One that loses all of its points stays where it is.
        iterations: at most so many.

    Returns:
        `[k, d]`, of the start that ends with the smallest sum of squared distances.
    """
    restarts, k, d = centres.shape
    before: Tensor | None = None
    assigned, cost = _assign(points, centres)
    for _ in range(iterations):
        if before is not None and torch.equal(assigned, before):
            break
        before = assigned
        sums = points.new_zeros(restarts * k, d)
        number = (assigned + k * torch.arange(restarts, device=points.device)[:, None]).flatten()
        for start in range(restarts):
            sums.index_add_(0, number.view(restarts, -1)[start], points)
        counts = torch.bincount(number, minlength=restarts * k)[:, None]
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centres.flatten(0, 1))
        centres = moved.view(restarts, k, d)
        assigned, cost = _assign(points, centres)
    return centres[cost.argmin()]


def normalised_mutual_information(a: Tensor, b: Tensor) -> float:
    """Mutual information of two labellings over the mean of their entropies (Strehl and Ghosh 2002, arithmetic mean).

    Args:
        a, b: `[n]` int64, n >= 1.

    Returns:
        in [0, 1]; 1 where both are constant, as scikit-learn has it.
    """
    _, a = a.unique(return_inverse=True)
    _, b = b.unique(return_inverse=True)
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    joint = torch.bincount(a * columns + b, minlength=rows * columns).view(rows, columns).double() / len(a)
    of_a, of_b = joint.sum(1), joint.sum(0)
    entropy = (_entropy(of_a) + _entropy(of_b)) / 2
    if entropy == 0:
        return 1.0
    return max(0.0, min(1.0, (2 * entropy - _entropy(joint.flatten())) / entropy))


def _entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum())


def _assign(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, d]` and `[R, k, d]` -> the nearest centre `[R, n]` int64, and the sum of squared distances `[R]`."""
    restarts, k, _ = centres.shape
    flat = centres.flatten(0, 1)
    offset = flat.square().sum(1)
    nearest, cost = [], points.new_zeros(restarts, dtype=torch.float32)
    for block in torch.split(points, _ROW_BLOCK):
        distance = torch.addmm(offset, block, flat.T, alpha=-2).view(len(block), restarts, k)
        best = distance.min(dim=2)
        nearest.append(best.indices.T)
        cost += (best.values + block.square().sum(1, keepdim=True)).sum(0)
    return torch.cat(nearest, dim=1), cost


def _starts(points: Tensor, k: int, seed: int, restarts: int) -> Tensor:
    """Centres `[R, k, d]`: each next one is a point drawn by its squared distance to those there are."""
    generator = torch.Generator().manual_seed(scalar_seed(seed, "k-means", 0))
    first = torch.randint(len(points), (restarts,), generator=generator).to(points.device)
    chosen = [first]
    squares = points.square().sum(1)
    distance = points.new_full((restarts, len(points)), float("inf"))
    for _ in range(k - 1):
        last = points[chosen[-1]]
        new = squares + last.square().sum(1, keepdim=True) - 2 * last @ points.T
        distance = torch.minimum(distance, new.clamp(min=0))
        # Where all points are taken already, any will do.
        weights = torch.where(distance.sum(1, keepdim=True) > 0, distance, torch.ones_like(distance))
        chosen.append(torch.multinomial(weights.cpu(), 1, generator=generator)[:, 0].to(points.device))
    return points[torch.stack(chosen, dim=1)]
