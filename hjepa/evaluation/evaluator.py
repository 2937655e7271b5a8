"""Probes of the encoders of a run on the labelled part of its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa.config.schema import Augmentation, Data, Evaluation
from hjepa.data.source import Source
from hjepa.data.views import Views
from hjepa.evaluation.features import Embed, collect, pixel_features
from hjepa.evaluation.probes import probes
from hjepa.rng import permute

Probe = tuple[Source, Source]
"""A labelled source twice: its part for training the probe (the bank) and its part for testing it."""

Named = Iterator[tuple[str, float]]


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


@dataclass(frozen=True)
class _Part:
    """The images of one side (train or test) that are looked at, over all sources."""

    sources: list[Source]
    indices: list[NDArray[np.int64]]
    class_offsets: list[int]

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.indices)


class Evaluator:
    """k-NN and linear probes of frozen encoders. It knows nothing of training.

    The images are chosen once, from the seed alone, so all evaluations of a run see the same ones. Sources
    share them in proportion to their sizes, and classes of different sources are different classes.

    Values are top-1 accuracies in percent. The encoders come as `Embed`: `[n, 3, S, S]` float32 normalised
    images on the device -> features `[n, d]` by name, of which "last" is the one that stands for the encoder.

    Attributes:
        num_classes: over all sources.
        num_train, num_test: images that are looked at.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        data: Data,
        seed: int,
        pairs: Sequence[Probe | None],
        device: torch.device,
    ) -> None:
        reason = skip_reason(pairs)
        assert reason is None, reason
        labelled = usable(pairs)
        classes = [bank.num_classes for bank, _ in labelled]
        offsets = [sum(classes[:i]) for i in range(len(classes))]
        self._config = evaluation
        self._seed = seed
        self._device = device
        # Half of a probe is float64, which mps lacks.
        self._probe_device = torch.device("cpu") if device.type == "mps" else device
        normalise = Augmentation(mean=data.augmentation.mean, std=data.augmentation.std)
        self._views = Views(normalise, data.image_size).to(device)
        banks, tests = [bank for bank, _ in labelled], [test for _, test in labelled]
        self._train = _choose(banks, offsets, evaluation.max_train, seed, "probe train")
        self._test = _choose(tests, offsets, evaluation.max_test, seed, "probe test")
        self._baselines: list[tuple[str, float]] | None = None
        self.num_classes = sum(classes)
        self.num_train = len(self._train)
        self.num_test = len(self._test)

    def evaluate(self, target: Embed, online: Embed | None = None) -> Named:
        """Probes of every feature of the target encoder, and of the online encoder's last.

        Yields:
            `knn`, `linear` of the target's "last"; `knn_online`, `linear_online` of the online encoder's;
            `knn_<feature>`, `linear_<feature>` for each other feature of the target.
        """

        def both(images: Tensor) -> dict[str, Tensor]:
            of_target = target(images)
            assert "online" not in of_target
            # Both see each batch, so every image is decoded once.
            of_online = {"online": online(images)["last"]} if online else {}
            rest = {name: rows for name, rows in of_target.items() if name != "last"}
            return {"last": of_target["last"], **of_online, **rest}

        yield from self._probe(both)

    def baselines(self, random: Embed) -> Named:
        """What a probe says without any training; computed at the first call and remembered.

        Args:
            random: the run's encoder before its first step.

        Yields:
            `knn_pixels`, `linear_pixels` of the raw pixels; `knn_random`, `linear_random` of the random
            encoder's "last".
        """

        def both(images: Tensor) -> dict[str, Tensor]:
            return {"pixels": pixel_features(images), "random": random(images)["last"]}

        if self._baselines is None:
            self._baselines = list(self._probe(both))
        yield from self._baselines

    def _probe(self, embed: Embed) -> Named:
        train, train_labels = self._collect(embed, self._train)
        test, test_labels = self._collect(embed, self._test)
        labels = train_labels.to(self._probe_device), test_labels.to(self._probe_device)
        for name in list(train):
            suffix = "" if name == "last" else f"_{name}"
            # Popped: features that are done with need not stay in memory.
            bank, queries = train.pop(name).to(self._probe_device), test.pop(name).to(self._probe_device)
            if name == "pixels":
                mean = bank.mean(0)
                bank, queries = bank - mean, queries - mean
            for kind, value in probes(self._config, bank, labels[0], queries, labels[1], self.num_classes, self._seed):
                yield kind + suffix, value

    def _collect(self, embed: Embed, part: _Part) -> tuple[dict[str, Tensor], Tensor]:
        pieces = [
            (collect(embed, source, indices, self._views, self._config.batch_size, self._device), offset)
            for source, indices, offset in zip(part.sources, part.indices, part.class_offsets, strict=True)
            if len(indices)
        ]
        names = pieces[0][0][0]
        features = {name: torch.cat([found[name] for (found, _), _ in pieces]) for name in names}
        return features, torch.cat([labels + offset for (_, labels), offset in pieces])


def _choose(sources: list[Source], class_offsets: list[int], limit: int, seed: int, stream: str) -> _Part:
    """At most `limit` images in all: a random subset of each source, in the order of storage."""
    counts = shares([len(source) for source in sources], limit)
    indices = []
    for position, (source, count) in enumerate(zip(sources, counts, strict=True)):
        every = np.arange(count, dtype=np.int64)
        chosen = permute(seed, f"{stream} {position}", np.zeros_like(every), every, len(source))
        indices.append(np.sort(chosen))
    return _Part(sources, indices, class_offsets)


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
