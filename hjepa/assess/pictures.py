"""The images that are looked at, by number, whatever sources they lie in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hjepa.config.data import Data
from hjepa.data.source import Float32, Int64, Read, Source
from hjepa.data.views import ViewParameters, Views, center_views, draw_views, plain_views
from hjepa.evaluation.chosen import Part


class Pictures:
    """One side of an evaluation: `len` images of one or several sources.

    Attributes:
        labels: `[n]` int64, where the sources have labels. An image that cannot be read is replaced by another of its
            source, with that one's label, so they are known once every image has been read (`learn_labels`).
    """

    def __init__(self, part: Part, data: Data, seed: int, device: torch.device) -> None:
        self._part, self._config, self._seed, self._device = part, data, seed, device
        counts = [len(indices) for indices in part.indices]
        self._source = np.repeat(np.arange(len(counts)), counts)
        self._index = np.concatenate(part.indices)
        self._plain = plain_views(data.augmentation, data.image_size).to(device)
        self._views = Views(data.augmentation, data.image_size).to(device)
        self.labels = torch.full((len(self._index),), -1)
        self._starts = np.cumsum([0, *counts])
        self._held: list[Read] | None = None

    def hold(self, limit: float) -> None:
        """Decode everything once, for probes that see it again and again, where it fits into so many bytes."""
        sources, indices = self._part.sources, self._part.indices
        size = sum(3 * s.size[0] * s.size[1] * len(rows) for s, rows in zip(sources, indices, strict=True))
        if self._held is None and size <= limit:
            self._held = [source.read(rows) for source, rows in zip(sources, indices, strict=True)]

    def __len__(self) -> int:
        return len(self._index)

    def plain(self, rows: Tensor) -> Tensor:
        """`[b]` int64 -> `[b, 3, S, S]` float32 on the device, normalised: the largest centred square of each."""
        return self.read(rows)[0]

    def read(self, rows: Tensor) -> tuple[Tensor, Int64]:
        """`plain`, and the numbers in their source of the images that were read."""
        out, used = self._empty(rows), np.empty(len(rows), np.int64)
        for places, source, pixels, sizes, found in self._sources(rows):
            out[places.to(self._device)] = self._plain(pixels, center_views(sizes).to(self._device))
            used[places.numpy()] = found
            if source.labels is not None:
                offset = self._part.class_offsets[self._part.sources.index(source)]
                self.labels[rows[places]] = torch.from_numpy(source.labels[found]) + offset
        return out, used

    def augmented(self, rows: Tensor, epoch: int) -> Tensor:
        """The run's own augmentation: as `plain`, a function of the row and the epoch."""
        out = self._empty(rows)
        for places, _, pixels, sizes, _ in self._sources(rows):
            positions = rows[places].numpy() + epoch * len(self)
            drawn = draw_views(self._config.augmentation, self._seed, "fine-tuning", positions, sizes)
            out[places.to(self._device)] = self._shown(pixels, drawn)
        return out

    def _shown(self, pixels: Tensor, drawn: ViewParameters) -> Tensor:
        shown: Tensor = self._views(pixels, drawn.to(self._device))
        return shown

    def _empty(self, rows: Tensor) -> Tensor:
        return torch.empty(len(rows), 3, self._config.image_size, self._config.image_size, device=self._device)

    def _sources(self, rows: Tensor) -> Iterator[tuple[Tensor, Source, Tensor, Float32, Int64]]:
        """For each source that some rows lie in: their places among the rows, and what was read of them."""
        of_rows = self._source[rows.numpy()]
        for number in np.unique(of_rows):
            source = self._part.sources[number]
            places = np.flatnonzero(of_rows == number)
            read = self._read(number, rows.numpy()[places])
            pixels = torch.from_numpy(read.images).to(self._device)
            yield torch.from_numpy(places), source, pixels, read.true_sizes, read.indices

    def _read(self, number: int, rows: Int64) -> Read:
        if self._held is None:
            return self._part.sources[number].read(self._index[rows])
        held, places = self._held[number], rows - self._starts[number]
        return Read(held.images[places], held.true_sizes[places], held.indices[places], {})
