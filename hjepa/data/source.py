"""What a set of images is to the rest of the house."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.data.bad_files import BadFiles

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


class Read(NamedTuple):
    """What came of reading some images.

    Attributes:
        images: `[n, 3, height, width]` uint8 RGB.
        true_sizes: `[n, 2]` float32, height and width in pixels before squeezing.
        indices: `[n]` int64, which images these are: others than were asked for where a file could not be read.
        bad: reason by path of the files that could not be read.
    """

    images: UInt8
    true_sizes: Float32
    indices: Int64
    bad: Mapping[str, str]


class Source(ABC):
    """Images of one stored size, addressed by index.

    Images of varying size are kept squeezed to one square, with their true size beside them: every batch is
    rectangular, no border is cut off, and a crop drawn in true pixels keeps its aspect.

    Attributes:
        name: as in the config, for messages.
        size: stored (height, width) in pixels, the same for all images.
        labels: `[len]` int64 class of each image, or None.
        num_classes: number of classes, 0 without labels.
        bad_files: what could not be read, or None for a source without files of its own.
        left_out: links that lead out of its folder and were not followed.
        reading: `[1]` int64 where the index of the file that is being read is noted (-1 for none), for a process
            that waits for this one.
    """

    name: str
    size: tuple[int, int]
    labels: Int64 | None = None
    num_classes: int = 0
    bad_files: BadFiles | None = None
    left_out: Sequence[str] = ()
    reading: Int64 | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def images(self, indices: Int64) -> UInt8:
        """`[n]` indices -> `[n, 3, height, width]` uint8 RGB."""

    def read(self, indices: Int64) -> Read:
        """`[n]` indices -> the images, those that cannot be read replaced by others of the source.

        Which image stands for another is a function of its index and of the files, not of what was read before.

        Raises:
            DataError: when more cannot be read than may be.
        """
        return Read(self.images(indices), self.true_sizes(indices), indices, {})

    def true_sizes(self, indices: Int64) -> Float32:
        """`[n]` indices -> `[n, 2]` float32, height and width in pixels before squeezing."""
        return np.broadcast_to(np.asarray(self.size, np.float32), (len(indices), 2)).copy()

    def masks(self, indices: Int64) -> Bool | None:
        """`[n]` indices -> `[n, height, width]` bool, where an object of the image's class is seen; None if unknown."""
        return None

    def place(self, index: int) -> str:
        """Where an image lies, in words."""
        return f"image {index} of {self.name}"

    @property
    def nbytes(self) -> int:
        """Memory that all images take once decoded, in bytes."""
        return len(self) * 3 * self.size[0] * self.size[1]


def links_left_out(source: Source) -> str:
    """What to say of a source that has links which were not followed."""
    count, first = len(source.left_out), source.left_out[0]
    return f"{source.name}: {count} link(s) that lead out of the folder were left out, the first {first}"
