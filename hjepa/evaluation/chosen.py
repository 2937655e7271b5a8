"""Which labelled images are looked at: a function of the seed and of the sources alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hjepa.data.source import Source
from hjepa.rng import permute

Probe = tuple[Source, Source]
"""A labelled source twice: its part for training the probe (the bank) and its part for testing it."""


def usable(pairs: Sequence[Probe | None]) -> list[Probe]:
    """The pairs that can be probed: labels on both sides, and at least one image each."""
    return [pair for pair in pairs if pair is not None and all(side.labels is not None and len(side) for side in pair)]


def skip_reason(pairs: Sequence[Probe | None]) -> str | None:
    """Why there is nothing to evaluate, in words for the console, or None where there is something."""
    labelled = usable(pairs)
    if not labelled:
        return "k-NN skipped: no source has labels and a test part"
    if sum(bank.num_classes for bank, _ in labelled) < 2:
        return "k-NN skipped: all labelled images are of one class"
    return None


def with_masks(pairs: Sequence[Probe]) -> Probe | None:
    """The first pair that knows which pixels are an object, if there is one."""
    return next((pair for pair in pairs if all(side.masks(np.arange(1)) is not None for side in pair)), None)


@dataclass(frozen=True)
class Part:
    """The images of one side (train or test) that are looked at, over all sources."""

    sources: list[Source]
    indices: list[NDArray[np.int64]]
    class_offsets: list[int]

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.indices)


def choose_sides(pairs: Sequence[Probe], max_train: int, max_test: int, seed: int) -> tuple[Part, Part]:
    """What is learned from and what is asked, at most so many images of each; classes of two sources are different."""
    classes = [bank.num_classes for bank, _ in pairs]
    offsets = [sum(classes[:i]) for i in range(len(classes))]
    train = choose([bank for bank, _ in pairs], offsets, max_train, seed, "probe train")
    return train, choose([test for _, test in pairs], offsets, max_test, seed, "probe test")


def choose(sources: list[Source], class_offsets: list[int], limit: int, seed: int, stream: str) -> Part:
    """At most `limit` images in all: a random subset of each source, in the order of storage."""
    counts = shares([len(source) for source in sources], limit)
    indices = []
    for position, (source, count) in enumerate(zip(sources, counts, strict=True)):
        every = np.arange(count, dtype=np.int64)
        chosen = permute(seed, f"{stream} {position}", np.zeros_like(every), every, len(source))
        indices.append(np.sort(chosen))
    return Part(sources, indices, class_offsets)


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """At most `limit` things spread over groups in proportion to their sizes (largest remainders)."""
    total = sum(sizes)
    if total <= limit:
        return list(sizes)
    counts = [size * limit // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(sizes[i] * limit % total))
    for i in by_remainder[: limit - sum(counts)]:
        counts[i] += 1
    return counts
