"""Sources that are folders of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from hjepa.data.bad_files import BadFiles, listed
from hjepa.data.decode import ImageError, decode, true_size
from hjepa.data.source import Float32, Int64, Read, Source, UInt8
from hjepa.errors import DataError
from hjepa.rng import permute

EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
MAX_THREADS = 8

_HOLD_OUT_SEED = 0
_SUBSTITUTE_SEED = 0
_LOOKED_FOR = f"{', '.join(EXTENSIONS)}; hidden files and links that lead out of the folder are left out"


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
        self.paths = list(paths)
        self.size = (side, side)
        self.labels = labels
        self.num_classes = num_classes
        self.bad_files: BadFiles = BadFiles(name, len(self.paths), max_bad)
        self.left_out = left_out
        self._true_sizes = np.zeros((len(self.paths), 2), np.float32)  # 0: not known yet

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

        # Pillow decodes without the interpreter's lock. A loader worker has one torch thread, as there are
        # several of it. Threads do not survive a fork, so the pool lives no longer than the call.
        threads = min(len(rows), torch.get_num_threads(), MAX_THREADS)
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
        left_out: list[str] = []
        paths = list(_walk(root, root, left_out))
        if not paths:
            raise DataError(f"no images under {root} (looked for {_LOOKED_FOR})")
        super().__init__(name, paths, side, max_bad=max_bad, left_out=left_out)


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
        whole = folder == root
        left_out: list[str] = []
        here = _class_names(folder, root, left_out)
        self.classes = here if whole else _class_names(root / "train", root)
        unknown = sorted(set(here) - set(self.classes))
        if unknown:
            raise DataError(f"{name}: {folder} has the class {unknown[0]}, which the training folder lacks")

        paths: list[str] = []
        labels: list[int] = []
        for label, class_name in enumerate(self.classes):
            found = list(_walk(folder / class_name, root, left_out)) if class_name in here else []
            if whole:
                found = _part(found, class_name, held_out=split != "train")
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise DataError(
                f"{name}: no images for split {split} in the class folders of {folder} (looked for {_LOOKED_FOR})"
            )
        super().__init__(name, paths, side, np.asarray(labels, np.int64), len(self.classes), max_bad, left_out)


def has_test(path: str | os.PathLike[str]) -> bool:
    """Whether class folders have a test part, of their own or held out."""
    root = _existing(Path(path))
    folder = split_folder(root, "test")
    if folder != root:
        return folder is not None
    return any(len(list(islice(_walk(root / name, root), 2))) == 2 for name in _class_names(root, root))


def split_folder(root: Path, split: str) -> Path | None:
    """Folder whose subfolders are the classes of `split`: `root` itself if not divided, None if absent."""
    parts = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    for part in parts.values():
        if not _inside(part, root):
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


def _class_names(folder: Path, root: Path, left_out: list[str] | None = None) -> list[str]:
    names = [entry.name for entry in _visible(folder, root, left_out) if entry.is_dir()]
    if not names:
        raise DataError(
            f"no class folders in {folder}; images with labels lie in one subfolder per class, "
            "images without labels are read with name: folder"
        )
    return names


def _walk(folder: str | Path, root: Path, left_out: list[str] | None = None) -> Iterator[str]:
    """Paths of the image files in `folder`, by sorted name, depth first; see `_visible`."""
    for entry in _visible(folder, root, left_out):
        # A linked folder is not entered: what lies inside the root is found where it lies.
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, root, left_out)
        elif entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
            yield entry.path


def _visible(folder: str | Path, root: Path, left_out: list[str] | None = None) -> list[os.DirEntry[str]]:
    """Entries by sorted name, without hidden ones and links that lead to nothing, back up, or out of `root`.

    Args:
        folder: what is listed.
        root: the folder of the images.
        left_out: the links that lead out of it are added here.
    """
    try:
        with os.scandir(str(folder)) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
    kept = []
    for entry in sorted(shown, key=lambda entry: entry.name):
        if entry.is_symlink():
            if not _inside(entry.path, root):
                if left_out is not None:
                    left_out.append(entry.path)
                continue
            # To nothing, in a circle, or to a folder that this one is in.
            if not os.path.exists(entry.path) or _inside(folder, entry.path):
                continue
        kept.append(entry)
    return kept


def _inside(path: str | Path, folder: str | Path) -> bool:
    """Whether the one lies in the other, or is it, once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _part(paths: list[str], class_name: str, held_out: bool) -> list[str]:
    """A tenth of a class (one image at least, of two or more), or the rest."""
    n = len(paths)
    count = max(1, n // 10) if n > 1 else 0
    # The class names the stream, so a class that is added changes no other.
    order = permute(_HOLD_OUT_SEED, f"hold-out/{class_name}", np.zeros(n, np.int64), np.arange(n), max(n, 1))
    chosen = set(order[:count].tolist())
    return [path for i, path in enumerate(paths) if (i in chosen) == held_out]
