"""A few images that somebody gave a class: a subfolder for each, or a table of files and labels."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hjepa.data.index import open_index
from hjepa.data.source import Int64
from hjepa.data.walk import LOOKED_FOR
from hjepa.errors import DataError

TABLES = (".csv", ".tsv")
_PARTS = {"train", "val", "test"}
_SHOWN = 5

Copy = tuple[int, bytes]
"""What files of equal content share: their size in bytes and their sha256."""


@dataclass(frozen=True)
class Labelled:
    """Image files with a class each.

    Attributes:
        origin: what named them.
        paths: absolute, `[n]`.
        names: as they were given.
        labels: `[n]` int64 in [0, number of classes).
        classes: names of the classes, sorted.
    """

    origin: Path
    paths: list[str]
    names: list[str]
    labels: Int64
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def only(self, rows: Iterable[int]) -> Labelled:
        """Some of them; a class that none of them has is no class any more."""
        rows = list(rows)
        there = sorted({int(self.labels[row]) for row in rows})
        labels = np.asarray([there.index(int(self.labels[row])) for row in rows], np.int64)
        classes = [self.classes[label] for label in there]
        return Labelled(self.origin, [self.paths[r] for r in rows], [self.names[r] for r in rows], labels, classes)

    def counts(self) -> dict[str, int]:
        """Images by class."""
        return dict(zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))


def read_labelled(path: Path, folder: Path | None = None) -> Labelled:
    """Images with labels, each image once.

    Args:
        path: a folder with one subfolder of images per class; or a `.csv` or `.tsv` file with the columns `file` and
            `label`, whose other columns and whose rows without a label are passed over.
        folder: where a table's files are looked for as well, when they are not beside it.

    Raises:
        DataError: naming what is missing, named twice, or of no use.
    """
    if path.is_dir():
        found = _of_folders(path.expanduser().absolute())
    elif path.suffix.lower() in TABLES and path.is_file():
        found = _of_table(path, folder)
    else:
        wanted = f"a folder with one subfolder of images per class, or a table ({', '.join(TABLES)}) of file,label"
        raise DataError(f"{path}: {'not' if path.exists() else 'missing; expected'} {wanted}")
    return _each_once(found)


def _of_folders(root: Path) -> Labelled:
    index = open_index(root, root, classes=True)
    ranges = index.classes()
    if not ranges:
        raise DataError(f"{root}: no subfolders; images with labels lie in one subfolder per class")
    if set(ranges) <= _PARTS:
        raise DataError(f"{root}: is divided into {', '.join(f'{name}/' for name in ranges)}; name one of them")
    for name, (first, last) in ranges.items():
        if first == last:
            raise DataError(f"{root / name}: no images (looked for {LOOKED_FOR}); put some there, or remove the folder")
    classes = sorted(ranges)
    paths, labels = [], []
    for label, name in enumerate(classes):
        rows = range(*ranges[name])
        paths += [index.path(row) for row in rows]
        labels += [label] * len(rows)
    names = [os.path.relpath(path, root) for path in paths]
    return Labelled(root, paths, names, np.asarray(labels, np.int64), classes)


def _of_table(path: Path, folder: Path | None) -> Labelled:
    places = [path.absolute().parent, *([folder.expanduser().absolute()] if folder is not None else [])]
    paths, names, words, wrong = [], [], [], []
    for number, name, label in rows_of_table(path):
        if not label:
            continue
        there = next((place / name for place in places if (place / name).is_file()), None)
        if there is None:
            wrong.append(f"{path}, line {number}: no file {name} in {' or '.join(map(str, places))}")
            continue
        paths.append(str(there))
        names.append(name)
        words.append(label)
    if wrong:
        more = [f"{path}: {len(wrong) - _SHOWN} more lines name files that are not there"] * (len(wrong) > _SHOWN)
        raise DataError("\n".join((*wrong[:_SHOWN], *more)))
    if not paths:
        raise DataError(f"{path}: no row has a label")
    classes = sorted(set(words))
    return Labelled(path, paths, names, np.asarray([classes.index(word) for word in words], np.int64), classes)


def rows_of_table(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, file and label of each row of a table.

    Raises:
        DataError: when it cannot be read, or lacks one of the columns.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            file.seek(0)
            tab, semicolon = path.suffix.lower() == ".tsv", ";" in first and "," not in first
            table = csv.DictReader(file, delimiter="\t" if tab else ";" if semicolon else ",")
            columns = {name.strip().lower(): name for name in table.fieldnames or [] if name}
            missing = [name for name in ("file", "label") if name not in columns]
            if missing:
                raise DataError(f"{path}, line 1: no column {' and no column '.join(missing)}; it must name file,label")
            for row in table:
                name, label = ((row[columns[key]] or "").strip() for key in ("file", "label"))
                if name or label:
                    yield table.line_num, name, label
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def copy_of(path: str, sizes: Collection[int] | None = None) -> Copy | None:
    """See `Copy`; None where the file cannot be read, or is of none of these sizes."""
    try:
        size = os.path.getsize(path)
        if sizes is not None and size not in sizes:
            return None
        with open(path, "rb") as file:
            return size, hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _each_once(found: Labelled) -> Labelled:
    """Copies of one image tell an accuracy nothing and make it look better; of equal ones the first stays.

    Raises:
        DataError: for an image that is in two classes.
    """
    first: dict[Copy, int] = {}
    rows = []
    for row, path in enumerate(found.paths):
        content = copy_of(path)
        before = row if content is None else first.setdefault(content, row)
        if found.labels[before] != found.labels[row]:
            given = [found.classes[found.labels[at]] for at in (before, row)]
            raise DataError(
                f"{found.origin}: {found.names[before]} and {found.names[row]} are the same image, labelled "
                f"{given[0]} and {given[1]}; keep one"
            )
        if before == row:
            rows.append(row)
    return found if len(rows) == len(found) else found.only(rows)
