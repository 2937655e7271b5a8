"""What frozen features know about the classes: k nearest neighbours and a linear classifier.

Both are solved exactly, with no learning rate to tune, so two encoders differ by their features alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.sections import Evaluation
from hjepa.evaluation.ridge import Ridge
from hjepa.evaluation.task import held_out

# Similarities are computed in blocks of this many queries and bank rows: 8 MiB of float32, whatever the bank.
_QUERY_BLOCK = 256
_BANK_BLOCK = 8192
_FIRST_BLOCK = 1024
_LOW_32 = 0xFFFFFFFF


class LinearResult(NamedTuple):
    """What the linear probe found."""

    accuracy: float
    """Top-1 on the test part, in percent."""
    l2: float
    """The regularisation that was chosen on a part of train."""


def probes(
    config: Evaluation,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    seed: int,
) -> Iterator[tuple[str, float]]:
    """Every probe that the config asks for, as (name, top-1 accuracy in percent).

    Args:
        config: which probes, and their settings.
        train, test: `[n, d]` and `[m, d]` float32 features.
        train_labels, test_labels: `[n]` and `[m]` int64 in [0, num_classes).
        num_classes: number of classes.
        seed: of the part of train on which the linear probe chooses its regularisation.

    Yields:
        `knn`, then `linear`. Features that are not finite yield nan: a run goes on without its probe.
    """
    finite = bool(train.isfinite().all() and test.isfinite().all())
    data = (train, train_labels, test, test_labels)
    if not finite:
        yield "knn", math.nan
    else:
        k, temperature = config.knn.k, config.knn.temperature
        yield "knn", knn_accuracy(*data, k=k, temperature=temperature, num_classes=num_classes)
    if not config.linear:
        return
    if not finite:
        yield "linear", math.nan
    else:
        yield "linear", linear_probe(*data, l2=config.linear_l2, num_classes=num_classes, seed=seed).accuracy


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of `[n]` predictions that equal their `[n]` labels, in percent."""
    return 100.0 * (predicted == labels).double().mean().item()


# ---- k nearest neighbours


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> float:
    """Top-1 accuracy in percent of `knn_predict`, which see; `query_labels` are `[m]` int64."""
    predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature, num_classes=num_classes)
    return accuracy(predicted, query_labels)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """The class that the k nearest bank rows vote for (Wu et al. 2018, section 3.4).

    Similarity is the cosine; a neighbour's vote weighs exp(similarity / temperature). Of classes with equal
    votes the lowest wins.

    Args:
        bank: `[n, d]` float features whose labels are known.
        bank_labels: `[n]` int64 in [0, num_classes).
        queries: `[m, d]` float features on the bank's device.
        k: neighbours; all of the bank where that is smaller.
        temperature: of the weights.
        num_classes: number of classes.

    Returns:
        `[m]` int64.
    """
    return vote(*nearest(bank, queries, k), bank_labels, temperature=temperature, num_classes=num_classes)


def vote(
    similarity: Tensor, neighbours: Tensor, bank_labels: Tensor, *, temperature: float, num_classes: int
) -> Tensor:
    """The class that neighbours vote for, see `knn_predict`.

    Args:
        similarity, neighbours: `[m, k]` cosines and bank indices, as `nearest` gives them.
        bank_labels, temperature, num_classes: see `knn_predict`.

    Returns:
        `[m]` int64.
    """
    # Relative to the nearest neighbour: the same ranking, and no overflow at a low temperature.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    labels = bank_labels[neighbours]
    predicted = [
        w.new_zeros(len(w), num_classes).scatter_add_(1, c, w).argmax(1)
        for w, c in zip(torch.split(weights, _QUERY_BLOCK), torch.split(labels, _QUERY_BLOCK), strict=True)
    ]
    return torch.cat(predicted)


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
) -> tuple[Tensor, Tensor]:
    """The k bank rows of highest cosine similarity to each query, nearest first.

    Memory is that of one block of similarities, whatever the size of the bank: the best k so far are merged
    with the best k of each block. Of equal similarities the lowest bank index comes first.

    Args:
        bank: `[n, d]` float features, n >= 1.
        queries: `[m, d]` float features, m >= 1.
        k: neighbours; clamped to n.
        query_block, bank_block: rows per block.

    Returns:
        Similarities `[m, min(k, n)]` float32 and bank indices `[m, min(k, n)]` int64.
    """
    assert len(bank)
    assert len(queries)
    k = min(k, len(bank))
    blocks = torch.split(queries, query_block)
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=bank.device) for block in blocks]
    # A small first block: all of it is packed, of the others only what is nearer than the best so far.
    ends = [*range(min(max(k, _FIRST_BLOCK), bank_block), len(bank), bank_block), len(bank)]
    for start, end in zip([0, *ends], ends, strict=False):
        rows = F.normalize(bank[start:end].float(), dim=1)
        for number, block in enumerate(blocks):
            similarity = F.normalize(block.float(), dim=1) @ rows.T
            best[number] = _merge(best[number], similarity, start, k)
    return _unpack(torch.cat(best))


def _merge(best: Tensor, similarity: Tensor, start: int, k: int) -> Tensor:
    """The best k keys `[m, k]` of those so far `[m, at most k]` and of similarities `[m, b]` at bank rows start..."""
    if best.shape[1] < k:
        keys = _pack(similarity, torch.arange(start, start + similarity.shape[1], device=similarity.device))
    else:
        # Rows come in their order, so of equally similar ones the one that was found before is the one to keep.
        bound = _unpack(best[:, -1:])[0]
        count = int((similarity > bound).sum(dim=1).max())
        if not count:
            return best
        values, index = similarity.topk(count, dim=1)
        keys = _pack(values, start + index).masked_fill_(values <= bound, torch.iinfo(torch.int64).min)
    keys = torch.cat([best, keys], dim=1)
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """`[m, b]` float32 at bank rows `index` -> int64 keys that sort by similarity, then by lower index.

    No two keys are equal: which of equally similar rows are taken is not left to topk.
    """
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0 makes one zero of two
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers: flip them
    return (ordered.long() << 32) | (_LOW_32 - index)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_32 - (keys & _LOW_32)


# ---- linear


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    l2: Sequence[float],
    num_classes: int,
    seed: int,
) -> LinearResult:
    """A linear classifier in closed form, its regularisation chosen on a held-out fifth of train.

    The fit is that of `Ridge`, with lambda = l2 * n:

        W = argmin |Z W + 1 p' - Y|^2 + lambda |W|^2 = (Z'Z + lambda I)^-1 Z'Y,    class = argmax(z W + p)

    for n standardised rows Z, one-hot labels Y and class frequencies p. The chosen value is refitted on all
    of train; test is looked at once, by the final classifier. Of values that do equally well the strongest is
    taken.

    Args:
        train: `[n, d]` float features.
        train_labels: `[n]` int64 in [0, num_classes).
        test: `[m, d]` float features on the same device.
        test_labels: `[m]` int64.
        l2: values to choose from, relative to the number of rows; at least one.
        num_classes: number of classes.
        seed: of the split of train.
    """
    candidates = sorted(set(l2), reverse=True)
    chosen = candidates[0]
    choice, fit = (rows.to(train.device) for rows in held_out(len(train), seed))
    if len(candidates) > 1 and len(choice):
        ridge = Ridge(train[fit], train_labels[fit], num_classes)
        scores = [
            accuracy(ridge.predict(train[choice], weights), train_labels[choice])
            for weights in ridge.weights(candidates)
        ]
        chosen = candidates[scores.index(max(scores))]
    ridge = Ridge(train, train_labels, num_classes)
    (weights,) = ridge.weights([chosen])
    return LinearResult(accuracy(ridge.predict(test, weights), test_labels), chosen)
