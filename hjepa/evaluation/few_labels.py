"""A linear classifier of frozen features for few labels, and what it can be trusted with.

Ridge regression on one-hot labels (`Ridge`), whose regularisation and whose scale of probabilities are chosen by
leave-one-out in closed form: no part of few labels has to be set aside for that. The accuracy is measured by repeated
stratified cross-validation around all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.data.source import Int64
from hjepa.evaluation.ridge import Ridge
from hjepa.rng import permute

L2 = tuple(10.0 ** (power / 2) for power in range(-6, 7))
"""Regularisations to choose from, relative to the number of rows, as in `Ridge`."""

_SCALES = 0.05, 1000.0  # between them the factor on the scores is looked for
_HALVINGS = 24
_FEWEST_FOLDS, _MOST_FOLDS = 3, 10
_MOST_REPEATS, _TESTS = 10, 2000  # as many repeats as test so many images in all, one at least
_95 = 1.96


class Linear(NamedTuple):
    """softmax(x weight + bias) is the probability of each class for features x.

    Attributes:
        weight: `[d, C]` float64.
        bias: `[C]` float64.
    """

    weight: Tensor
    bias: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """`[m, d]` float -> `[m, C]` float64."""
        return (features.double() @ self.weight + self.bias).softmax(dim=1)


@dataclass(frozen=True)
class Accuracy:
    """What cross-validation says of a classifier.

    Attributes:
        mean: share of the images named rightly while they were left out, in percent, over all repeats.
        spread: standard deviation of that over the repeats, in percent points; None where there is one.
        confidence: mean probability of the class that was named, in percent; where probabilities mean what they
            say it is near `mean`.
        images: how many were tested.
    """

    mean: float
    spread: float | None
    confidence: float
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval that so few images leave open, in percent (Wilson 1927)."""
        share, z2 = self.mean / 100, _95**2 / self.images
        middle = (share + z2 / 2) / (1 + z2)
        half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
        return 100 * (middle - half), 100 * (middle + half)


def fit(features: Tensor, labels: Tensor, num_classes: int) -> Linear:
    """A classifier whose probabilities are scaled to what it is right about.

    For each regularisation every row's scores by a fit without it are known in closed form; the regularisation and
    the factor on the scores are those of the lowest log loss of these. Its targets are 1 - 1 / (n + 2) rather than 1
    (Platt 1999), so that few labels without an error do not make it certain. Rows alone in their class have no say.

    Args:
        features: `[n, d]` float, finite.
        labels: `[n]` int64 in [0, num_classes), at least two of some class.
        num_classes: number of classes, C >= 2.
    """
    ridge = Ridge(features, labels, num_classes)
    asked = torch.bincount(labels, minlength=num_classes)[labels] > 1
    smoothing = num_classes / (num_classes - 1) / (len(labels) + 2)
    target = F.one_hot(labels[asked], num_classes).double() * (1 - smoothing) + smoothing / num_classes
    best: tuple[float, float, Tensor] | None = None
    for weights, scores in ridge.leave_one_out(features, labels, sorted(L2, reverse=True)):
        scale = _scale_of(scores[asked], target)
        loss = -(target * (scale * scores[asked]).log_softmax(dim=1)).sum(dim=1).mean().item()
        if best is None or loss < best[0]:
            best = loss, scale, weights
    assert best is not None
    _, scale, weights = best
    weight = scale * ridge.scale[:, None] * weights
    return Linear(weight, scale * ridge.prior - ridge.mean @ weight)


def _scale_of(scores: Tensor, target: Tensor) -> float:
    """The factor on `[n, C]` scores that makes their softmax nearest to `[n, C]` targets; the loss is convex in it."""
    low, high = math.log(_SCALES[0]), math.log(_SCALES[1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = (((math.exp(middle) * scores).softmax(dim=1) - target) * scores).sum().item()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp((low + high) / 2)


def cross_validate(
    features: Mapping[str, Tensor],
    labels: Tensor,
    num_classes: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Accuracy], dict[str, Tensor]]:
    """The accuracy of `fit` on images that were left out, for several kinds of features over the same folds.

    Folds are stratified, 3 to 10 of them, and drawn anew for each of up to 10 repeats. An image alone in its class
    is in the training part of every fold: without it the class would not be known.

    Args:
        features: `[n, d]` float by name.
        labels: `[n]` int64 in [0, num_classes), two or more rows each of two or more classes.
        num_classes: number of classes, C.
        seed: of the folds.
        progress: called with (done, total) fits.

    Returns:
        by name the accuracy, and `[n, C]` float64 probabilities of each row by fits without it, averaged over the
        repeats; nan for a row that is alone in its class.
    """
    tested = torch.bincount(labels, minlength=num_classes)[labels] > 1
    count = int(tested.sum())
    repeats = max(1, min(_MOST_REPEATS, _TESTS // count))
    folds = torch.from_numpy(np.stack([stratified(labels.numpy(), tested.numpy(), seed, r) for r in range(repeats)]))
    every = int(folds.max()) + 1
    accuracies, probabilities = {}, {}
    done, total = 0, len(features) * repeats * every
    for name, rows in features.items():
        said = torch.full((repeats, len(labels), num_classes), torch.nan, dtype=torch.float64)
        for repeat in range(repeats):
            for fold in range(every):
                left_out = folds[repeat] == fold
                fitted = fit(rows[~left_out], labels[~left_out], num_classes)
                said[repeat, left_out] = fitted.probabilities(rows[left_out])
                done += 1
                progress(done, total)
        right = 100 * (said[:, tested].argmax(dim=2) == labels[tested]).double().mean(dim=1)
        spread = right.std().item() if repeats > 1 else None
        sure = 100 * said[:, tested].amax(dim=2).mean().item()
        accuracies[name] = Accuracy(right.mean().item(), spread, sure, count)
        probabilities[name] = said.mean(dim=0)
    return accuracies, probabilities


def stratified(labels: Int64, tested: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], seed: int, repeat: int) -> Int64:
    """The fold `[n]` int64 in which each row is left out, -1 for never: classes are dealt out one after another."""
    folds = np.full(len(labels), -1, np.int64)
    smallest = np.bincount(labels[tested])
    # As many as the smallest class has images leave out as much of every class: where frequencies are all that is
    # known, a class of which more was left out is never named.
    count = min(_MOST_FOLDS, max(_FEWEST_FOLDS, int(smallest[smallest > 0].min())))
    dealt = 0
    for label in np.unique(labels[tested]):
        rows = np.flatnonzero(tested & (labels == label))
        order = permute(seed, f"folds {label}", np.full(len(rows), repeat), np.arange(len(rows)), len(rows))
        folds[rows[order]] = (dealt + np.arange(len(rows))) % count
        dealt += len(rows)
    return folds
