"""Sources that are folders of image files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from hjepa.data.bad_files import BadFiles, listed
from hjepa.data.decode import ImageError, decode, true_size
from hjepa.data.index import Paths, open_index
from hjepa.data.source import Float32, Int64, Read, Source, UInt8
from hjepa.data.walk import LOOKED_FOR, class_names, has_two, inside
from hjepa.device import process_layout
from hjepa.errors import DataError
from hjepa.rng import permute

MAX_THREADS = 8

_HOLD_OUT_SEED = 0
_SUBSTITUTE_SEED = 0


def _threads() -> int:
    """As many as torch takes; torchrun leaves it one, so a process of several takes its share of the machine.

    A loader worker takes one, as there are several of it.
    """
    local, _ = process_layout()
    if local == 1 or get_worker_info() is not None:
        return torch.get_num_threads()
    share = max(1, (os.cpu_count() or 1) // local)
    return min(share, len(os.sched_getaffinity(0))) if sys.platform == "linux" else share


class FileSource(Source):
    """Image files, squeezed to `side` x `side` as they are decoded.

    Attributes:
        paths: of the files, in the order of the indices.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        side: int,
        labels: Int64 | None = None,
        num_classes: int = 0,
        max_bad: float = 0.0,
        left_out: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.paths = paths
        self.size = (side, side)
        self.labels = labels
        self.num_classes = num_classes
        self.bad_files: BadFiles = BadFiles(name, len(paths), max_bad)
        self.left_out = left_out
        self._true_sizes = np.zeros((len(paths), 2), np.float32)  # 0: not known yet; takes memory as it is filled

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, indices: Int64) -> UInt8:
        """`[n]` indices -> `[n, 3, side, side]` uint8 RGB; a file that cannot be read is a `DataError`."""
        out = np.empty((len(indices), 3, *self.size), np.uint8)
        for error in self._decode(indices, np.arange(len(indices)), out):
            if error is not None:
                raise error
        return out

    def read(self, indices: Int64) -> Read:
        """See `Source.read`."""
        out = np.empty((len(indices), 3, *self.size), np.uint8)
        used, rows = np.array(indices, np.int64), np.arange(len(indices))
        bad: dict[str, str] = {}
        for tries in range(len(self) + 1):
            errors = self._decode(used, rows, out)
            bad |= {error.path: error.reason for error in errors if error is not None}
            self.bad_files.add(bad)
            rows = rows[np.array([error is not None for error in errors], bool)]
            if not len(rows):
                break
            if tries == len(self):
                raise DataError(f"{self.name}: none of {len(self)} files can be read: {listed(bad)}")
            # Every image has an order of its own of all images of the source; the first that can be read stands for it.
            place = np.full(len(rows), tries)
            used[rows] = permute(_SUBSTITUTE_SEED, "substitute", indices[rows], place, len(self))
        return Read(out, self._true_sizes[used], used, bad)

    def _decode(self, indices: Int64, rows: Int64, out: UInt8) -> list[ImageError | None]:
        """Decode image `indices[row]` into `out[row]` for these rows; what went wrong with each."""

        def fill(row: int) -> ImageError | None:
            index = indices[row]
            if self.reading is not None:
                self.reading[0] = index
            try:
                _, self._true_sizes[index] = decode(self.paths[index], self.size[0], out[row])
            except ImageError as error:
                return error
            return None

        # Pillow decodes without the interpreter's lock. Threads do not survive a fork, so the pool lives no longer than
        # the call.
        threads = min(len(rows), _threads(), MAX_THREADS)
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                errors = list(pool.map(fill, rows))
        else:
            errors = [fill(row) for row in rows]
        if self.reading is not None:
            self.reading[0] = -1
        return errors

    def place(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def positions(self, paths: Iterable[str]) -> Int64:
        """Indices `[n]` of those of these files that are of the source, ascending."""
        found = []
        for path in paths:
            with suppress(ValueError):
                found.append(self.paths.index(path))
        return np.sort(np.asarray(found, np.int64))

    def true_sizes(self, indices: Int64) -> Float32:
        """`[n]` indices -> `[n, 2]` float32 height and width; read from the header if not decoded yet."""
        for index in indices:
            if not self._true_sizes[index, 0]:
                self._true_sizes[index] = true_size(self.paths[index])
        return self._true_sizes[indices]


class FolderSource(FileSource):
    """All images under a folder, however nested, without labels."""

    def __init__(self, path: str | os.PathLike[str], side: int, name: str = "folder", max_bad: float = 0.0) -> None:
        root = _existing(Path(path))
        index = open_index(root, root)
        if not len(index):
            raise DataError(f"no images under {root} (looked for {LOOKED_FOR})")
        super().__init__(name, Paths(index), side, max_bad=max_bad, left_out=index.left_out)


class ClassFolderSource(FileSource):
    """Images in one folder per class; classes are numbered by the sorted names of the training folders.

    The parts are `path`/train and `path`/val or `path`/test. Where the class folders lie in `path` itself, a
    tenth of each class, always the same, is held out as the test part.

    Attributes:
        classes: names of the class folders, by label.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        side: int,
        split: str = "train",
        name: str = "imagefolder",
        max_bad: float = 0.0,
    ) -> None:
        root = _existing(Path(path))
        folder = split_folder(root, split)
        if folder is None:
            raise DataError(f"{name}: {root} has no test part (looked for val/ and test/ beside train/)")
        index = open_index(folder, root, classes=True)
        ranges = index.classes()
        here = _some(ranges, folder)
        divided = folder != root
        self.classes = _classes_of(root / "train", root) if divided and split != "train" else here
        unknown = sorted(set(here) - set(self.classes))
        if unknown:
            raise DataError(f"{name}: {folder} has the class {unknown[0]}, which the training folder lacks")

        rows, counts = None, [last - first for first, last in ranges.values()]
        if not divided:
            parts = [_part(*bounds, class_name, split != "train") for class_name, bounds in ranges.items()]
            rows, counts = np.concatenate(parts), [len(part) for part in parts]
        paths = Paths(index, rows)
        if not len(paths):
            raise DataError(
                f"{name}: no images for split {split} in the class folders of {folder} (looked for {LOOKED_FOR})"
            )
        number = {class_name: label for label, class_name in enumerate(self.classes)}
        labels = np.repeat(np.asarray([number[class_name] for class_name in here], np.int64), counts)
        super().__init__(name, paths, side, labels, len(self.classes), max_bad, index.left_out)


def has_test(path: str | os.PathLike[str]) -> bool:
    """Whether class folders have a test part, of their own or held out."""
    root = _existing(Path(path))
    folder = split_folder(root, "test")
    if folder != root:
        return folder is not None
    return any(has_two(root / name, root) for name in _classes_of(root, root))


def split_folder(root: Path, split: str) -> Path | None:
    """Folder whose subfolders are the classes of `split`: `root` itself if not divided, None if absent."""
    parts = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    for part in parts.values():
        if not inside(part, root):
            raise DataError(
                f"{part} is a link that leads out of {root}, which is not followed; name the folder it is in"
            )
    if not parts:
        return root
    if "train" not in parts:
        raise DataError(f"{root} has {' and '.join(f'{part}/' for part in parts)} but no train/")
    if split == "train":
        return parts["train"]
    other = "val" if split == "test" else "test"
    return parts.get(split) or parts.get(other)


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise DataError(f"{path} is {'not a folder' if path.exists() else 'missing'}; expected a folder of images")
    return path


def _classes_of(folder: Path, root: Path) -> list[str]:
    return _some(class_names(folder, root), folder)


def _some(classes: Iterable[str], folder: Path) -> list[str]:
    names = list(classes)
    if not names:
        raise DataError(
            f"no class folders in {folder}; images with labels lie in one subfolder per class, "
            "images without labels are read with name: folder"
        )
    return names


def _part(first: int, last: int, class_name: str, held_out: bool) -> Int64:
    """A tenth of a class's files (one at least, of two or more), or the rest: numbers in [first, last), ascending."""
    n = last - first
    count = max(1, n // 10) if n > 1 else 0
    # The class names the stream, so a class that is added changes no other.
    chosen = permute(_HOLD_OUT_SEED, f"hold-out/{class_name}", np.zeros(count, np.int64), np.arange(count), max(n, 1))
    mine = np.full(n, not held_out)
    mine[chosen] = held_out
    return first + np.flatnonzero(mine)
