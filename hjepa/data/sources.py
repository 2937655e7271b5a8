"""From the config to sources: what is trained on, what is probed, what is kept in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch

from hjepa.config.data import Data, Dataset
from hjepa.data.archives import ArraySource, cifar, stl10
from hjepa.data.files import ClassFolderSource, FolderSource, has_test
from hjepa.data.shapes import Shapes
from hjepa.data.source import Float32, Int64, Read, Source, UInt8

Progress = Callable[[int, int], None]

SHAPES_LENGTH = 20000

_CHUNK = 256

# How a data set is called on the console.
TITLES = {
    "shapes": "shapes",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "imagenet": "ImageNet",
    "imagefolder": "imagefolder",
    "folder": "folder",
}


def open_source(dataset: Dataset, data: Data, seed: int, split: str | None = None) -> Source:
    """Open one part of one data set.

    Args:
        dataset: which one.
        data: where data sets lie, at which size files are kept, and whether to download.
        seed: the run's; procedural images are a function of it.
        split: train, test, val (the same as test where there is one of them), for stl10 also unlabeled and
            train+unlabeled. None for the part that the data set is trained on.

    Raises:
        DataError: the images are missing or damaged.
    """
    path = data.data_path if dataset.path is None else dataset.path
    split = split or dataset.split or ("train+unlabeled" if dataset.name == "stl10" else "train")
    match dataset.name:
        case "shapes":
            length = dataset.length or SHAPES_LENGTH
            if split == "train":
                return Shapes(length, seed)
            return Shapes(max(1000, length // 10), seed, "test")
        case "cifar10" | "cifar100":
            return cifar(dataset.name, path, split, data.download)
        case "stl10":
            return stl10(path, split, data.download)
        case "imagefolder" | "imagenet":
            return ClassFolderSource(path, decode_side(data), split, dataset.name, data.max_bad_fraction)
        case "folder":
            return FolderSource(path, decode_side(data), dataset.name, data.max_bad_fraction)


def open_training(data: Data, seed: int) -> list[Source]:
    """What a run trains on, in the order of `data.datasets`."""
    return [open_source(dataset, data, seed) for dataset in data.datasets]


def open_probe(dataset: Dataset, data: Data, seed: int) -> tuple[Source, Source] | None:
    """The labelled train part and the test part of a data set; None where it lacks labels or a test part."""
    if dataset.name == "folder":
        return None
    if dataset.name in ("imagefolder", "imagenet") and not has_test(dataset.path or data.data_path):
        return None
    # Where a folder has both val/ and test/, val/ is the one with labels (ImageNet).
    return open_source(dataset, data, seed, "train"), open_source(dataset, data, seed, "val")


def decode_side(data: Data) -> int:
    """Side at which image files are kept, in pixels."""
    return data.decode_size or -(-data.image_size // 7) * 8


class CachedSource(Source):
    """A source decoded once, in memory that loader processes share.

    Args:
        source: what is decoded, all of it, at once.
        progress: called with (done, total) images.
        sample: decode only so many images, spread evenly, and show them in the place of all; for trials.

    Attributes:
        decoded: how many images lie in memory.
        seconds_per_image: time that decoding one took.
    """

    def __init__(self, source: Source, progress: Progress | None = None, sample: int | None = None) -> None:
        self._length = len(source)
        self.decoded = min(len(source), sample or len(source))
        stride = len(source) // self.decoded
        started = time.monotonic()
        self.name = source.name
        self.size = source.size
        self.labels = source.labels
        self.num_classes = source.num_classes
        self.bad_files = source.bad_files
        self.left_out = source.left_out
        self._true_sizes = np.empty((self.decoded, 2), np.float32)
        self._indices = np.empty(self.decoded, np.int64)
        self._images = _shared_memory((self.decoded, 3, *source.size))
        for start in range(0, self.decoded, _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, self.decoded))
            read = source.read(rows * stride)
            self._images[start : start + len(rows)] = torch.from_numpy(read.images)
            self._true_sizes[rows], self._indices[rows] = read.true_sizes, read.indices
            if progress is not None:
                progress(start + len(rows), self.decoded)
        self.seconds_per_image = (time.monotonic() - started) / self.decoded

    def __len__(self) -> int:
        return self._length

    def images(self, indices: Int64) -> UInt8:
        """`[n]` indices -> `[n, 3, height, width]` uint8 RGB."""
        out: UInt8 = self._images.numpy()[indices % self.decoded]
        return out

    def read(self, indices: Int64) -> Read:
        """What was read when the source was decoded; what could not be was noted then."""
        return Read(self.images(indices), self.true_sizes(indices), self._indices[indices % self.decoded], {})

    def true_sizes(self, indices: Int64) -> Float32:
        """`[n]` indices -> `[n, 2]` float32, as the source gave them."""
        return self._true_sizes[indices % self.decoded]


def _shared_memory(shape: tuple[int, ...]) -> torch.Tensor:
    # Moved before it is filled: pages that were never written cost nothing to move.
    images = torch.empty(shape, dtype=torch.uint8)
    # A container's /dev/shm is small. Forked loaders share ordinary memory too, as nobody writes to it.
    with suppress(RuntimeError):
        images.share_memory_()
    return images


def cache(
    sources: Sequence[Source], limit_gb: float, progress: Progress | None = None, sample: int | None = None
) -> list[Source]:
    """Decode the sources that fit into `limit_gb` (10^9 bytes), smallest first; the order stays.

    A source that lies in memory already is left as it is and does not count.

    Args:
        sources: what the run reads.
        limit_gb: memory for all decoded sources together.
        progress: called with (done, total) images over all sources that are decoded.
        sample: decode only so many images of each, see `CachedSource`.
    """
    left = limit_gb * 1e9
    chosen = []
    for i in sorted(range(len(sources)), key=lambda i: sources[i].nbytes):
        if not isinstance(sources[i], ArraySource | CachedSource) and sources[i].nbytes <= left:
            left -= sources[i].nbytes
            chosen.append(i)
    total = sum(len(sources[i]) for i in chosen)
    out = list(sources)
    done = 0
    for i in chosen:

        def report(part: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + part, total)

        out[i] = CachedSource(sources[i], report, sample)
        done += len(sources[i])
    return out
