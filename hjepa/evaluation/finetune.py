"""The whole encoder, trained on the labels: what its weights are worth as a start."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from hjepa.evaluation.probes import accuracy
from hjepa.evaluation.task import Figure, Task, held_out
from hjepa.evaluation.trained import cosine
from hjepa.model.backbone import Backbone
from hjepa.rng import scalar_seed


class Images(Protocol):
    """Labelled images by their number."""

    def __len__(self) -> int: ...

    def plain(self, rows: Tensor) -> Tensor:
        """`[b]` int64 -> `[b, 3, S, S]` normalised, the centred square of each."""

    def augmented(self, rows: Tensor, epoch: int) -> Tensor:
        """The same, cut and coloured at random; a function of the row and the epoch."""


@dataclass(frozen=True)
class Recipe:
    """How an encoder is fine-tuned (after BEiT and MAE: AdamW, layer-wise decay of the learning rate, cosine).

    Attributes:
        epochs: passes over train.
        rates: peak learning rates of the head, to choose from.
        layer_decays: by which factor a block's rate is below the next one's, to choose from; 1 is what an untrained
            encoder needs.
        weight_decay: AdamW's, none on norms, biases, positions.
        batch_size: images per step.
        warmup: share of the steps over which the rate rises.
        clip: largest norm of the gradient.
    """

    epochs: int = 10
    rates: tuple[float, ...] = (5e-4, 2e-3)
    layer_decays: tuple[float, ...] = (0.75, 1.0)
    weight_decay: float = 0.05
    batch_size: int = 128
    warmup: float = 0.1
    clip: float = 1.0


class Classifier(nn.Module):
    """An encoder and a linear layer on the mean of its final tokens: `[b, 3, S, S]` -> `[b, C]`."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.head(self.backbone(images).tokens.mean(dim=1))
        return out


def finetune(
    backbone: Backbone,
    task: Task[Images],
    arithmetic: Callable[[], AbstractContextManager[object]],
    recipe: Recipe,
) -> Figure:
    """Top-1 accuracy of an encoder after some epochs of supervised training.

    Learning rate and layer decay are chosen on a held-out fifth of train; with the pair that does best there, training
    starts again from the given weights on all of train. Test is looked at once, at the end.

    Args:
        backbone: where training starts; it is left as it is.
        task: see `Images`; its seed is that of the order of images and of the last layer's weights.
        arithmetic: the precision that the encoder is trained in.
        recipe: see `Recipe`.
    """
    pairs = [(rate, decay) for rate in sorted(recipe.rates) for decay in sorted(recipe.layer_decays)]
    train, test, train_labels = task.train, task.test, task.train_labels
    choice, fit = held_out(len(train), task.seed)
    best = pairs[0]
    if len(pairs) > 1 and len(choice):
        scores = []
        for pair in pairs:
            model = _fit(backbone, task, fit, arithmetic, recipe, *pair)
            scores.append(accuracy(_predict(model, train, choice, arithmetic, recipe), train_labels[choice]))
        best = pairs[scores.index(max(scores))]
    every = torch.arange(len(train))
    model = _fit(backbone, task, every, arithmetic, recipe, *best)
    found = _predict(model, test, torch.arange(len(test)), arithmetic, recipe)
    chosen = {"lr": best[0], "layer_decay": best[1], "epochs": float(recipe.epochs)}
    return Figure(accuracy(found, task.test_labels), chosen=chosen)


def _fit(
    backbone: Backbone,
    task: Task[Images],
    rows: Tensor,
    arithmetic: Callable[[], AbstractContextManager[object]],
    recipe: Recipe,
    rate: float,
    layer_decay: float,
) -> Classifier:
    images, labels, seed = task.train, task.train_labels, task.seed
    device = next(backbone.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scalar_seed(seed, "head of a probe", 0))
        model = Classifier(deepcopy(backbone), task.num_classes).to(device).requires_grad_(True).train()
        optimizer = _optimizer(model, recipe, rate, layer_decay)
        size = min(recipe.batch_size, len(rows))
        steps = recipe.epochs * -(-len(rows) // size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, recipe.warmup))
        generator = torch.Generator().manual_seed(scalar_seed(seed, "batches of a probe", 0))
        with torch.enable_grad():
            for epoch in range(recipe.epochs):
                order = rows[torch.randperm(len(rows), generator=generator)]
                for batch in torch.split(order, size):
                    with arithmetic():
                        logits = model(images.augmented(batch, epoch))
                    optimizer.zero_grad()
                    F.cross_entropy(logits.float(), labels[batch].to(device)).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                    optimizer.step()
                    schedule.step()
    return model.eval()


def _optimizer(model: Classifier, recipe: Recipe, rate: float, layer_decay: float) -> torch.optim.Optimizer:
    """AdamW, the rate of each block below that of the next."""
    vit = model.backbone.vit
    groups = param_groups_layer_decay(vit, recipe.weight_decay, vit.no_weight_decay(), layer_decay=layer_decay)
    scaled = [{"params": g["params"], "weight_decay": g["weight_decay"], "lr": rate * g["lr_scale"]} for g in groups]
    head = {"params": list(model.head.parameters()), "weight_decay": recipe.weight_decay, "lr": rate}
    return torch.optim.AdamW([*scaled, head], fused=True)


@torch.no_grad()
def _predict(
    model: Classifier,
    images: Images,
    rows: Tensor,
    arithmetic: Callable[[], AbstractContextManager[object]],
    recipe: Recipe,
) -> Tensor:
    found = []
    for batch in torch.split(rows, recipe.batch_size):
        with arithmetic():
            found.append(model(images.plain(batch)).argmax(1).cpu())
    return torch.cat(found)
