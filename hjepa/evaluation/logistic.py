"""Multinomial logistic regression on frozen features, by L-BFGS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.evaluation.probes import accuracy
from hjepa.evaluation.task import Figure, Task, held_out

L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ITERATIONS = 200


def logistic(task: Task[Tensor], l2: Sequence[float] = L2) -> Figure:
    """Top-1 accuracy of logistic regression, its regularisation chosen on a held-out fifth of train.

    As for the linear probe: the chosen value is refitted on all of train, test is looked at once, and of values that do
    equally well the strongest is taken.
    """
    candidates = sorted(set(l2), reverse=True)
    chosen = candidates[0]
    choice, fit = (rows.to(task.train.device) for rows in held_out(len(task.train), task.seed))
    if len(candidates) > 1 and len(choice):
        models = fits(task.train[fit], task.train_labels[fit], task.num_classes, candidates)
        scores = [accuracy(model.predict(task.train[choice]), task.train_labels[choice]) for model in models]
        chosen = candidates[scores.index(max(scores))]
    (model,) = fits(task.train, task.train_labels, task.num_classes, [chosen])
    return Figure(accuracy(model.predict(task.test), task.test_labels), chosen={"l2": chosen})


class Logistic:
    """A fitted classifier: class = argmax(z W + b) for standardised features z.

    Attributes:
        weights: `[d, C]` float64.
        bias: `[C]` float64.
    """

    def __init__(self, mean: Tensor, scale: Tensor, weights: Tensor, bias: Tensor) -> None:
        self.mean, self.scale, self.weights, self.bias = mean, scale, weights, bias

    def predict(self, features: Tensor) -> Tensor:
        """`[m, d]` -> `[m]` int64."""
        z = (features.double() - self.mean) * self.scale
        return (z @ self.weights + self.bias).argmax(1)


def fits(features: Tensor, labels: Tensor, num_classes: int, l2: Sequence[float]) -> Iterator[Logistic]:
    """Minimise mean cross-entropy + l2 / 2 |W|^2 for each l2 in turn, from where the last one ended.

    scikit-learn's `LogisticRegression(C=1 / (l2 n))` on standardised features is the same problem. A feature that does
    not vary gets no weight; the bias is not penalised.

    Args:
        features: `[n, d]` float.
        labels: `[n]` int64 in [0, num_classes).
        num_classes: number of classes.
        l2: strongest first, for the shortest way.
    """
    x = features.double()
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(deviation > torch.finfo(torch.float32).eps * (deviation + mean.abs()), deviation, torch.inf)
    scale = scale.reciprocal()
    z = (x - mean) * scale
    weights = z.new_zeros(z.shape[1], num_classes, requires_grad=True)
    bias = z.new_zeros(num_classes, requires_grad=True)
    for value in l2:
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss(value: float = value, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            out = F.cross_entropy(z @ weights + bias, labels) + value / 2 * weights.square().sum()
            out.backward()
            return out

        with torch.enable_grad():
            optimizer.step(loss)
        yield Logistic(mean, scale, weights.detach().clone(), bias.detach().clone())
