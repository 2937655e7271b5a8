"""Probes of the encoders of a run on the labelled part of its data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hjepa.config.data import Data
from hjepa.config.sections import Evaluation
from hjepa.data.source import Source
from hjepa.data.views import plain_views
from hjepa.evaluation.chosen import Part, Probe, choose_sides, skip_reason, usable, with_masks
from hjepa.evaluation.dense import DenseProbe, Tokens
from hjepa.evaluation.features import PIXEL_SIDE, Embed, collect, pixel_features
from hjepa.evaluation.probes import probes
from hjepa.evaluation.ridge import ROW_BLOCK
from hjepa.grid import Grid

Named = Iterator[tuple[str, float]]


class Evaluator:
    """k-NN and linear probes of frozen encoders. It knows nothing of training.

    The images are chosen once, from the seed alone, so all evaluations of a run see the same ones. Sources
    share them in proportion to their sizes, and classes of different sources are different classes.

    Values are top-1 accuracies in percent. The encoders come as `Embed`: `[n, 3, S, S]` float32 normalised
    images on the device -> features `[n, d]` by name, of which "last" is the one that stands for the encoder.

    Attributes:
        dense: probes of single patches on the first source that has masks, or None.
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
        grid: Grid | None = None,
    ) -> None:
        """Choose what is looked at.

        Args:
            evaluation, data: the sections.
            seed: of the choice.
            pairs: see `Probe`; None for a source that has no test part.
            device: where features are computed.
            grid: patches of an image, for the probes of single patches.
        """
        reason = skip_reason(pairs)
        assert reason is None, reason
        labelled = usable(pairs)
        self._config = evaluation
        self._seed = seed
        self._device = device
        # Half of a probe is float64, which mps lacks.
        self._probe_device = torch.device("cpu") if device.type == "mps" else device
        self._views = plain_views(data.augmentation, data.image_size).to(device)
        self._train, self._test = choose_sides(labelled, evaluation.max_train, evaluation.max_test, seed)
        self._baselines: list[tuple[str, float]] | None = None
        self.dense: DenseProbe | None = None
        masked = with_masks(labelled)
        if grid is not None and evaluation.dense and masked:
            place = self._device, self._probe_device
            self.dense = DenseProbe(evaluation, grid, masked, self._views, seed, *place)
        self.num_classes = sum(bank.num_classes for bank, _ in labelled)
        self.num_train = len(self._train)
        self.num_test = len(self._test)

    @property
    def sources(self) -> list[Source]:
        """What is looked at, both sides."""
        return [*self._train.sources, *self._test.sources]

    def evaluate(self, target: Embed, online: Embed | None = None) -> Named:
        """Probes of every feature of the target encoder, and of the online encoder's last.

        Yields:
            `knn`, `linear` of the target's "last"; `knn_online`, `linear_online` of the online encoder's;
            `knn_<feature>`, `linear_<feature>` for each other feature of the target.
        """
        yield from self._probe(_joined(target, online))

    def baselines(
        self, random: Embed, patches: Tokens | None = None, start: tuple[Embed, Tokens] | None = None
    ) -> Named:
        """What a probe says without any training; computed at the first call and remembered.

        Args:
            random: the run's encoder as it was initialised.
            patches: its tokens, for the probes of single patches.
            start: both of the encoder that training started from, where that is another one.

        Yields:
            `knn_pixels`, `linear_pixels` of the raw pixels; `knn_random`, `linear_random` of the random
            encoder's "last"; `knn_start`, `linear_start` likewise; where there are probes of single patches, those
            of all of them.
        """
        if self._baselines is None:
            self._baselines = list(self._probe(_beside_pixels(random, start[0] if start else None)))
            if self.dense is not None and patches is not None:
                self._baselines += [(f"{name}_pixels", value) for name, value in self.dense.baseline()]
                self._baselines += [(f"{name}_random", value) for name, value in self.dense(patches)]
                if start is not None:
                    self._baselines += [(f"{name}_start", value) for name, value in self.dense(start[1])]
        yield from self._baselines

    @property
    def has_baselines(self) -> bool:
        """Whether `baselines` have been computed and are remembered."""
        return self._baselines is not None

    def timing(
        self, target: Embed, online: Embed | None, random: Embed, start: Embed | None = None, seconds: float = 1.0
    ) -> tuple[float, float]:
        """Seconds that `evaluate` and the first `baselines` will take, from a few images and one small fit.

        Args:
            target, online, random, start: as `evaluate` and `baselines` take them.
            seconds: for how long each is timed.
        """
        first = np.argmax([len(indices) for indices in self._train.indices])
        source, indices = self._train.sources[first], self._train.indices[first]

        def features_of(embed: Embed, count: int) -> dict[str, Tensor]:
            size = min(self._config.batch_size, count)
            return collect(embed, source, indices[:count], self._views, size, self._device)[0]

        rate = self._fitting_rate()
        found = []
        for embed in (_joined(target, online), _beside_pixels(random, start)):
            features_of(embed, 2)
            took, count = 0.0, 8
            while took < seconds / 2 and count < len(indices):
                count = min(2 * count, len(indices))
                if self._device.type != "cpu" and count <= self._config.batch_size:
                    features_of(embed, count)  # a GPU's kernels are chosen, or made, when a batch of a size first comes
                begun = time.monotonic()
                features = features_of(embed, count)
                took = time.monotonic() - begun
            fits = sum(_work(self.num_train, self.num_test, rows.shape[1]) for rows in features.values())
            images = self.num_train + self.num_test + (self.dense.num_images if self.dense else 0)
            found.append(took / count * images + fits / rate)
        return found[0], found[1]

    def memory(self) -> int:
        """Bytes that an evaluation takes beside the encoder: features, and what the largest fit works on."""
        pixels = 3 * min(self._views.image_size, PIXEL_SIDE) ** 2
        side = min(pixels, self.num_train)
        features = 2 * 4 * pixels * (self.num_train + self.num_test)  # and a copy without the mean
        # A block of rows in float64 and a part of its standardised copy; the factor was fitted to two runs.
        blocks = 12 * pixels * min(self.num_train, ROW_BLOCK)
        return features + (blocks + 4 * 8 * side**2 if self._config.linear else 0)

    def _fitting_rate(self) -> float:
        """Operations per second of the probes, in the unit of `_work`."""
        n, m, d = 2048, 256, 384
        features = torch.randn(n + m, d, generator=torch.Generator().manual_seed(0)).to(self._probe_device)
        labels = torch.arange(n + m, device=self._probe_device) % 10
        for _ in range(2):  # the first call of a GPU's solvers loads them
            start = time.monotonic()
            list(probes(self._config, features[:n], labels[:n], features[n:], labels[n:], 10, self._seed))
        return _work(n, m, d) / (time.monotonic() - start)

    def _probe(self, embed: Embed) -> Named:
        train, train_labels = self._collect(embed, self._train)
        test, test_labels = self._collect(embed, self._test)
        labels = train_labels.to(self._probe_device), test_labels.to(self._probe_device)
        for name in list(train):
            suffix = "" if name == "last" else f"_{name}"
            # Popped: features that are done with need not stay in memory.
            bank, queries = train.pop(name).to(self._probe_device), test.pop(name).to(self._probe_device)
            mean = bank.mean(0)
            bank, queries = bank - mean, queries - mean
            for kind, value in probes(self._config, bank, labels[0], queries, labels[1], self.num_classes, self._seed):
                yield kind + suffix, value

    def _collect(self, embed: Embed, part: Part) -> tuple[dict[str, Tensor], Tensor]:
        pieces = [
            (collect(embed, source, indices, self._views, self._config.batch_size, self._device), offset)
            for source, indices, offset in zip(part.sources, part.indices, part.class_offsets, strict=True)
            if len(indices)
        ]
        names = pieces[0][0][0]
        features = {name: torch.cat([found[name] for (found, _), _ in pieces]) for name in names}
        return features, torch.cat([labels + offset for (_, labels), offset in pieces])


def _joined(target: Embed, online: Embed | None) -> Embed:
    """Features of both encoders at once, so that every image is decoded once."""

    def both(images: Tensor) -> dict[str, Tensor]:
        of_target = target(images)
        assert "online" not in of_target
        of_online = {"online": online(images)["last"]} if online else {}
        rest = {name: rows for name, rows in of_target.items() if name != "last"}
        return {"last": of_target["last"], **of_online, **rest}

    return both


def _beside_pixels(random: Embed, start: Embed | None) -> Embed:
    def all_of_them(images: Tensor) -> dict[str, Tensor]:
        of_start = {"start": start(images)["last"]} if start else {}
        return {"pixels": pixel_features(images), "random": random(images)["last"], **of_start}

    return all_of_them


def _work(n: int, m: int, d: int) -> float:
    """Operations of the probes on `[n, d]` and `[m, d]` features, up to a factor: neighbours, products, spectrum."""
    side = min(n, d)
    return n * m * d + 4 * n * d * side + 9 * side**3
