"""What a set of images is to the rest of the house."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


class Source(ABC):
    """Images of one stored size, addressed by index.

    Images of varying size are kept squeezed to one square, with their true size beside them: every batch is
    rectangular, no border is cut off, and a crop drawn in true pixels keeps its aspect.

    Attributes:
        name: as in the config, for messages.
        size: stored (height, width) in pixels, the same for all images.
        labels: `[len]` int64 class of each image, or None.
        num_classes: number of classes, 0 without labels.
    """

    name: str
    size: tuple[int, int]
    labels: Int64 | None = None
    num_classes: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def images(self, indices: Int64) -> UInt8:
        """`[n]` indices -> `[n, 3, height, width]` uint8 RGB."""

    def true_sizes(self, indices: Int64) -> Float32:
        """`[n]` indices -> `[n, 2]` float32, height and width in pixels before squeezing."""
        return np.broadcast_to(np.asarray(self.size, np.float32), (len(indices), 2)).copy()

    def masks(self, indices: Int64) -> Bool | None:
        """`[n]` indices -> `[n, height, width]` bool, where an object of the image's class is seen; None if unknown."""
        return None

    @property
    def nbytes(self) -> int:
        """Memory that all images take once decoded, in bytes."""
        return len(self) * 3 * self.size[0] * self.size[1]
