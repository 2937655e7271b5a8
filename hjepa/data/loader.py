"""Batches as functions of their number; `workers` has the processes that make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hjepa.config.data import Augmentation, Data
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
        drawn: parameters of each view, `[V, B, 12]` float32 (`ViewParameters.packed`).
        drawn_crops: of each local crop, `[C, B, 12]`.
        masks: `[V B, ...]`, view by view.
        positions: `[B]` int64, the samples' positions in the run.
        bad: source, path and reason of each file that could not be read; another image stands in its place.
    """

    images: tuple[Tensor, ...]
    drawn: Tensor
    drawn_crops: Tensor
    masks: Masks
    positions: Tensor
    bad: tuple[Bad, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, copied without waiting where its memory is pinned, which is for CUDA only."""
        non_blocking = device.type == "cuda"
        return Batch(
            tuple(images.to(device, non_blocking=non_blocking) for images in self.images),
            self.drawn.to(device, non_blocking=non_blocking),
            self.drawn_crops.to(device, non_blocking=non_blocking),
            self.masks.to(device, non_blocking=non_blocking),
            self.positions,
            self.bad,
        )

    @property
    def views(self) -> tuple[ViewParameters, ...]:
        """Parameters of each view."""
        return tuple(map(ViewParameters.unpacked, self.drawn))

    @property
    def crops(self) -> tuple[ViewParameters, ...]:
        """Parameters of each local crop."""
        return tuple(map(ViewParameters.unpacked, self.drawn_crops))

    def render(self, views: Views) -> Tensor:
        """Draw the views: `[V, B, 3, S, S]` float32, on the batch's device."""
        return self._render(self.drawn, views)

    def render_crops(self, crops: Views) -> Tensor | None:
        """Draw the local crops: `[C, B, 3, s, s]` float32, or None where there are none."""
        return self._render(self.drawn_crops, crops) if len(self.drawn_crops) else None

    def _render(self, drawn: Tensor, views: Views) -> Tensor:
        sizes, side = [len(images) for images in self.images], views.image_size
        rendered = torch.empty(*drawn.shape[:2], 3, side, side, device=drawn.device)
        for view, parameters in zip(rendered, drawn, strict=True):
            for images, out, of_source in zip(self.images, view.split(sizes), parameters.split(sizes), strict=True):
                views(images, ViewParameters.unpacked(of_source), out)
        return rendered


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

        def drawn(augmentation: Augmentation, streams: list[str]) -> Tensor:
            of_streams = (draw_views(augmentation, self.seed, stream, positions, true_sizes) for stream in streams)
            return torch.stack([parameters.packed() for parameters in of_streams]) if streams else torch.empty(0)

        names = [f"view{v}" for v in range(self.config.num_views)]
        masks = [self.masks.sample(self.seed, number // self.parts, name, positions) for name in names]
        crops = [f"crop{c}" for c in range(self.config.multicrop.num_local_crops)]
        return Batch(
            tuple(torch.from_numpy(read.images) for read in reads),
            drawn(self.config.augmentation, names),
            drawn(self.local, crops),
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
