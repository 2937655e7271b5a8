"""Probes that are trained by gradient on frozen features: the linear one of the literature, and the attentive one.

Both go the same way. Several heads that differ in their learning rate alone are trained side by side on four fifths of
train, so that every feature is read once for all of them; the other fifth chooses the rate; a new head is trained with
it on all of train; test is looked at once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from hjepa.evaluation.probes import accuracy
from hjepa.evaluation.task import Figure, Task, held_out
from hjepa.rng import scalar_seed


class Rows(Protocol):
    """Features of images by their number: a tensor, or what computes them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor:
        """`[b]` int64 -> `[b, ...]` floating point."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    Attributes:
        epochs: passes over train.
        rates: peak learning rates to choose from.
        batch_size: images per step.
        warmup: share of the steps over which the rate rises from 0; then it falls to 0 along half a cosine.
    """

    epochs: int
    rates: tuple[float, ...]
    batch_size: int = 256
    warmup: float = 0.0


# Linear evaluation as in MAE (He et al. 2022, A.1) and DINO (Caron et al. 2021): SGD, momentum 0.9, no weight decay.
SGD = Recipe(epochs=90, rates=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0))
# Attentive evaluation as in V-JEPA (Bardes et al. 2024): AdamW, weight decay 0.01, warm-up and cosine.
ATTENTIVE = Recipe(epochs=20, rates=(3e-4, 1e-3, 3e-3), warmup=0.1)
ATTENTIVE_DECAY = 0.01


class LinearHead(nn.Sequential):
    """A linear layer after batch norm without affine part, as in MAE: `[b, d]` -> `[b, C]`."""

    def __init__(self, dim: int, num_classes: int) -> None:
        linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


class AttentiveHead(nn.Module):
    """One learned query attends to all tokens of an image, then a linear layer: `[b, N, d]` -> `[b, C]`.

    Tokens are normalised per channel first, so that a probe of pixels is given what a probe of features is.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        heads = next(count for count in (16, 12, 8, 6, 4, 3, 2, 1) if dim % count == 0 and (dim >= 16 * count))
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.pool = AttentionPoolLatent(dim, num_heads=heads, norm_layer=nn.LayerNorm)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        normal = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        out: Tensor = self.linear(self.pool(normal))
        return out


def sgd_linear(task: Task[Tensor], recipe: Recipe = SGD) -> Figure:
    """Top-1 accuracy of a linear layer on pooled features `[., d]`, trained by SGD."""

    def optimizer(head: nn.Module, rate: float) -> torch.optim.Optimizer:
        # The rate is given for a batch of 256 and scaled with it, as in the sources.
        return torch.optim.SGD(head.parameters(), lr=rate * recipe.batch_size / 256, momentum=0.9)

    return _probe(LinearHead, optimizer, task, recipe)


def attentive(task: Task[Rows], recipe: Recipe = ATTENTIVE) -> Figure:
    """Top-1 accuracy of attentive pooling of all tokens `[., N, d]`, trained by AdamW."""

    def optimizer(head: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=ATTENTIVE_DECAY)

    return _probe(AttentiveHead, optimizer, task, recipe)


MakeHead = Callable[[int, int], nn.Module]
MakeOptimizer = Callable[[nn.Module, float], torch.optim.Optimizer]


def _probe(make: MakeHead, optimizer: MakeOptimizer, task: Task[Tensor] | Task[Rows], recipe: Recipe) -> Figure:
    rates = sorted(set(recipe.rates))
    train, test, labels = task.train, task.test, task.train_labels.cpu()
    choice, fit = held_out(len(train), task.seed)
    rate = rates[0]
    if len(rates) > 1 and len(choice):
        heads = _fit(make, optimizer, task, fit, rates, recipe)
        scores = [accuracy(found, labels[choice]) for found in _predict(heads, train, choice, recipe)]
        rate = rates[scores.index(max(scores))]
    heads = _fit(make, optimizer, task, torch.arange(len(train)), [rate], recipe)
    (found,) = _predict(heads, test, torch.arange(len(test)), recipe)
    return Figure(accuracy(found, task.test_labels.cpu()), chosen={"lr": rate, "epochs": float(recipe.epochs)})


def _fit(
    make: MakeHead,
    optimizer: MakeOptimizer,
    task: Task[Tensor] | Task[Rows],
    rows: Tensor,
    rates: list[float],
    recipe: Recipe,
) -> nn.ModuleList:
    """A head for each rate, trained on these rows of train; all start equal and see the same batches."""
    features, labels, seed = task.train, task.train_labels.cpu(), task.seed
    first = features[rows[:1]]
    with torch.random.fork_rng(devices=[]):
        heads = nn.ModuleList()
        for _ in rates:
            torch.manual_seed(scalar_seed(seed, "head of a probe", 0))
            heads.append(make(first.shape[-1], task.num_classes))
    heads.to(first.device).train()
    optimizers = [optimizer(head, rate) for head, rate in zip(heads, rates, strict=True)]
    size = min(recipe.batch_size, len(rows))
    steps = recipe.epochs * (len(rows) // size)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, cosine(steps, recipe.warmup)) for each in optimizers]
    generator = torch.Generator().manual_seed(scalar_seed(seed, "batches of a probe", 0))
    with torch.enable_grad():
        for _ in range(recipe.epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            # A last batch of one would leave batch norm without a variance; the next epoch has other leftovers.
            for batch in torch.split(order[: len(rows) // size * size], size):
                inputs, wanted = features[batch].float(), labels[batch].to(first.device)
                for head, step, schedule in zip(heads, optimizers, schedules, strict=True):
                    step.zero_grad()
                    F.cross_entropy(head(inputs), wanted).backward()
                    step.step()
                    schedule.step()
    return heads.eval()


@torch.no_grad()
def _predict(heads: nn.ModuleList, features: Rows, rows: Tensor, recipe: Recipe) -> list[Tensor]:
    """The class of each row `[n]` int64 on the CPU, by each head."""
    found: list[list[Tensor]] = [[] for _ in heads]
    for batch in torch.split(rows, recipe.batch_size):
        inputs = features[batch].float()
        for head, classes in zip(heads, found, strict=True):
            classes.append(head(inputs).argmax(1).cpu())
    return [torch.cat(classes) for classes in found]


def cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """The learning rate at a step as a share of its peak: up along a line, down along half a cosine."""
    rising = round(warmup * steps)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return share
