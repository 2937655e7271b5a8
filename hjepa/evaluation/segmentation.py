"""Which class every pixel is of, by a linear classifier of single patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.data.mask_files import IGNORED
from hjepa.evaluation.dense import Tokens
from hjepa.evaluation.ridge import Ridge
from hjepa.evaluation.task import Figure, held_out
from hjepa.grid import Grid

# Of training patches: what is fitted holds all of them at once.
MOST_PATCHES = 1 << 18
# Scores of pixels at a time: 64 MiB of float32.
_PIXELS = 1 << 24


class Scenes(NamedTuple):
    """Images and what is seen in each pixel of them.

    Attributes:
        size: number of images, n.
        read: rows `[b]` int64 -> normalised images `[b, 3, S, S]` on the device, and the class of each pixel
            `[b, S, S]` uint8 on the CPU, `IGNORED` for none.
    """

    size: int
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


def segment(
    tokens: Tokens,
    train: Scenes,
    test: Scenes,
    *,
    grid: Grid,
    num_classes: int,
    l2: Sequence[float],
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[str, Figure]]:
    """Ridge regression of each patch's most frequent class on its token (Oquab et al. 2023 train the same head by SGD).

    Regularisation is chosen by patch accuracy on the patches of a held-out fifth of the training images. On test the
    scores of patches are brought to the size of the image (bilinear) before the largest one is taken.

    Args:
        tokens: the frozen encoder.
        train, test: see `Scenes`.
        grid: patches of an image.
        num_classes: number of classes.
        l2: values to choose from, relative to the number of patches.
        batch_size: images per forward pass.
        seed: of the held-out images.
        device: where the probe is fitted.

    Yields:
        `miou`: intersection over union, the mean over the classes that are in the labels or in the answer, in percent;
        `patch_accuracy`: share of test patches whose most frequent class is told, in percent.
    """
    features, labels = _collect(tokens, train, grid, num_classes, batch_size, device)
    if not features.isfinite().all():
        yield "miou", Figure(float("nan"))
        yield "patch_accuracy", Figure(float("nan"))
        return
    ridge, weights, chosen = _fit(features, labels, num_classes, l2, train.size, seed)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    right = asked = 0
    chunk = min(batch_size, MOST_PATCHES // grid.size + 1)
    for rows in torch.split(torch.arange(test.size), chunk):
        images, maps = test.read(rows)
        scores = ridge.scores(tokens(images).float().flatten(0, 1).to(device), weights)
        wanted = patch_classes(maps, grid, num_classes).flatten().to(device)
        known = wanted >= 0
        right += int((scores.argmax(1) == wanted)[known].sum())
        asked += int(known.sum())
        confusion += _compare(scores.view(len(rows), grid.height, grid.width, -1), maps)
    yield "miou", Figure(100 * mean_iou(confusion), chosen={"l2": chosen})
    yield "patch_accuracy", Figure(100 * right / max(asked, 1), chosen={"l2": chosen})


def patch_classes(maps: Tensor, grid: Grid, num_classes: int) -> Tensor:
    """The most frequent class of each patch: `[b, S, S]` uint8 -> `[b, N]` int64, -1 where all of it is ignored.

    Of classes that are as frequent the lowest.
    """
    patches = maps.unflatten(2, (grid.width, -1)).unflatten(1, (grid.height, -1)).transpose(2, 3).flatten(1, 2)
    pixels = patches.flatten(2).flatten(0, 1).long()  # [b N, pixels of a patch]
    counts = torch.zeros(len(pixels), max(num_classes, IGNORED + 1), dtype=torch.int32)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=torch.int32))
    counts = counts[:, :num_classes]
    found = torch.where(counts.any(dim=1), counts.argmax(dim=1), -1)
    return found.view(len(maps), -1)


def mean_iou(confusion: Tensor) -> float:
    """`[C, C]` counts of (true, told) -> the mean over the classes that occur in either; in [0, 1]."""
    both = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((both / either)[either > 0].mean())


def _fit(
    features: Tensor, labels: Tensor, num_classes: int, l2: Sequence[float], images: int, seed: int
) -> tuple[Ridge, Tensor, float]:
    """The fitted classifier, its weights, and the regularisation that was chosen."""
    candidates = sorted(set(l2), reverse=True)
    known = labels >= 0
    chosen = candidates[0]
    choice, _ = held_out(images, seed)
    if len(candidates) > 1 and len(choice):
        aside = torch.zeros(images, dtype=torch.bool)
        aside[choice] = True
        # Whole images: patches of one are too much alike to be asked about each other.
        asked = aside.repeat_interleave(len(labels) // images).to(labels.device)
        fit, ask = known & ~asked, known & asked
        if fit.any() and ask.any():
            ridge = Ridge(features[fit], labels[fit], num_classes)
            right = [(ridge.predict(features[ask], w) == labels[ask]).float().mean() for w in ridge.weights(candidates)]
            chosen = candidates[int(torch.stack(right).argmax())]
    ridge = Ridge(features[known], labels[known], num_classes)
    (weights,) = ridge.weights([chosen])
    return ridge, weights, chosen


def _collect(
    tokens: Tokens, scenes: Scenes, grid: Grid, num_classes: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features `[n N, d]` and classes `[n N]` of all patches."""
    features, labels = [], []
    for rows in torch.split(torch.arange(scenes.size), batch_size):
        images, maps = scenes.read(rows)
        features.append(tokens(images).float().flatten(0, 1).to(device))
        labels.append(patch_classes(maps, grid, num_classes).flatten().to(device))
    return torch.cat(features), torch.cat(labels)


def _compare(scores: Tensor, maps: Tensor) -> Tensor:
    """Counts of (true, told) pixels: `[b, h, w, C]` scores, `[b, S, S]` classes -> `[C, C]` int64."""
    num_classes, side = scores.shape[-1], maps.shape[-1]
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    chunk = max(1, _PIXELS // (side * side * num_classes))
    for part, true in zip(torch.split(scores, chunk), torch.split(maps, chunk), strict=True):
        fine = F.interpolate(part.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=False)
        told, true = fine.argmax(1).cpu().flatten(), true.flatten().long()
        known = true < num_classes
        pairs = true[known] * num_classes + told[known]
        confusion += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    return confusion
