"""Batches as functions of their number; `workers` has the processes that make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hjepa.config.data import Data
from hjepa.data.mixture import mixture_of
from hjepa.data.source import Source
from hjepa.data.views import ViewParameters, Views, draw_views
from hjepa.errors import DataError
from hjepa.masks import BlockMasks, Masks
from hjepa.rng import Int64


class Bad(NamedTuple):
    """A file that could not be read: the number of its source, its path, and why."""

    source: int
    path: str
    reason: str


class Batch(NamedTuple):
    """One part of a step, as the host hands it over: undecorated images and what is to be done to them.

    Attributes:
        images: uint8 `[B_s, 3, H_s, W_s]` for each source that is in the batch; rows follow one another.
        views: parameters of each view, `[B, ...]`.
        crops: parameters of each local crop, likewise.
        masks: `[V B, ...]`, view by view.
        positions: `[B]` int64, the samples' positions in the run.
        bad: source, path and reason of each file that could not be read; another image stands in its place.
    """

    images: tuple[Tensor, ...]
    views: tuple[ViewParameters, ...]
    crops: tuple[ViewParameters, ...]
    masks: Masks
    positions: Tensor
    bad: tuple[Bad, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, copied without waiting where its memory is pinned, which is for CUDA only."""
        non_blocking = device.type == "cuda"
        return Batch(
            tuple(images.to(device, non_blocking=non_blocking) for images in self.images),
            tuple(view.to(device, non_blocking=non_blocking) for view in self.views),
            tuple(crop.to(device, non_blocking=non_blocking) for crop in self.crops),
            self.masks.to(device, non_blocking=non_blocking),
            self.positions,
            self.bad,
        )

    def render(self, views: Views) -> Tensor:
        """Draw the views: `[V, B, 3, S, S]` float32, on the batch's device."""
        return self._draw(self.views, views)

    def render_crops(self, crops: Views) -> Tensor | None:
        """Draw the local crops: `[C, B, 3, s, s]` float32, or None where there are none."""
        return self._draw(self.crops, crops) if self.crops else None

    def _draw(self, drawn: tuple[ViewParameters, ...], views: Views) -> Tensor:
        sizes = [len(images) for images in self.images]
        rendered = []
        for parameters in drawn:
            parts = zip(*(p.split(sizes) for p in parameters), strict=True)
            per_source = [views(images, ViewParameters(*part)) for images, part in zip(self.images, parts, strict=True)]
            rendered.append(torch.cat(per_source))
        return torch.stack(rendered)


class Batches(Dataset[Batch]):
    """The run's batches by number: batch k of this process is the same whoever asks for it, and when.

    Step t of the run takes positions [t B, (t + 1) B); they are dealt out first to the parts of an accumulated
    step, then to the processes.

    Attributes:
        steps_per_epoch: whole batches in an epoch; the remainder, another one each time, is left out.
    """

    def __init__(
        self,
        config: Data,
        sources: Sequence[Source],
        masks: BlockMasks,
        seed: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Plan the run.

        Raises:
            DataError: when an epoch is smaller than a batch, or than the processes that share one.
        """
        self.config = config
        self.sources = list(sources)
        self.masks = masks
        self.seed = seed
        self.parts, self.rank, self.world_size = accumulation_steps, rank, world_size
        self.mixture = mixture_of(config, sources, seed)
        self.batch_size = config.images_per_step
        self.local = config.augmentation.model_copy(update={"crop_scale": config.multicrop.local_crop_scale})
        shares = accumulation_steps * world_size
        assert self.batch_size % shares == 0, "the config's checks come first"
        self.steps_per_epoch = self.mixture.epoch_size // self.batch_size
        if self.mixture.epoch_size < shares:
            raise DataError(
                f"{self.mixture.epoch_size} image(s) an epoch do not divide into {world_size} process(es) x "
                f"training.accumulation_steps={accumulation_steps}; use fewer, or data.epoch_size={shares}"
            )
        if self.steps_per_epoch == 0:
            raise DataError(
                f"data.batch_size: {self.batch_size} is more than an epoch's {self.mixture.epoch_size} images; "
                f"use data.batch_size={self.mixture.epoch_size // shares * shares} or a larger data.epoch_size"
            )

    def positions(self, number: int) -> Int64:
        """Positions in the run of batch `number` of this process."""
        step, part = divmod(number, self.parts)
        size = self.batch_size // (self.parts * self.world_size)
        first = step * self.batch_size + (part * self.world_size + self.rank) * size
        return np.arange(first, first + size, dtype=np.int64)

    def samples(self, step: int) -> list[str]:
        """Where the images of a step of the run are found, those of other processes included."""
        source, index = self.locate(np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64))
        return [self.sources[s].place(int(i)) for s, i in zip(source, index, strict=True)]

    def locate(self, positions: Int64) -> tuple[Int64, Int64]:
        """Source and index `[n]` of the samples at these positions of the run."""
        per_epoch = self.steps_per_epoch * self.batch_size
        return self.mixture.locate(positions // per_epoch, positions % per_epoch)

    def __getitem__(self, number: int) -> Batch:
        positions = self.positions(number)
        source, index = self.locate(positions)
        order = np.argsort(source, kind="stable")  # rows of one source side by side: they share a stored size
        positions, source, index = positions[order], source[order], index[order]
        numbers = np.unique(source).tolist()
        reads = [self.sources[s].read(index[source == s]) for s in numbers]
        true_sizes = np.concatenate([read.true_sizes for read in reads])
        names = [f"view{v}" for v in range(self.config.num_views)]
        masks = [self.masks.sample(self.seed, number // self.parts, name, positions) for name in names]
        crops = [f"crop{c}" for c in range(self.config.multicrop.num_local_crops)]
        return Batch(
            tuple(torch.from_numpy(read.images) for read in reads),
            tuple(draw_views(self.config.augmentation, self.seed, name, positions, true_sizes) for name in names),
            tuple(draw_views(self.local, self.seed, name, positions, true_sizes) for name in crops),
            Masks(*(torch.cat(parts) for parts in zip(*masks, strict=True))),
            torch.from_numpy(positions),
            tuple(Bad(s, *item) for s, read in zip(numbers, reads, strict=True) for item in read.bad.items()),
        )

    def note(self, bad: Sequence[Bad]) -> None:
        """Take in what other processes could not read.

        Raises:
            DataError: when a source has more bad files than it may.
        """
        for s in {item.source for item in bad}:
            files = self.sources[s].bad_files
            assert files is not None
            files.add({item.path: item.reason for item in bad if item.source == s})

    def found(self) -> list[Bad]:
        """What this process knows of files that cannot be read."""
        ledgers = [(s, source.bad_files) for s, source in enumerate(self.sources) if source.bad_files is not None]
        return [Bad(s, *item) for s, files in ledgers for item in files.found.items()]
