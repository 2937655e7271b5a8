"""The image files under a folder, listed once and remembered on the disk.

Listing 10^6 files takes a second where the system has them in memory, and 125 MB as Python strings. An index holds
their names in one array that is mapped into memory, so that a path costs nothing until it is asked for. It is believed
as git believes its own: while every folder's times and inode are what they were. What a file contains is not in it and
may change.

Not remembered are folders with links, whose targets change unseen, and folders that changed less than a tick of the
clock before they were listed. A file of an index that is damaged, foreign or cannot be written costs a walk, no more.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

from hjepa.data import indexfile
from hjepa.data.indexfile import Damaged, Int64, Tables
from hjepa.data.walk import EXTENSIONS, Files, Folder, Link, State, state_of, walk
from hjepa.errors import DataError

# Folders that one thread looks after: threads pay off where each look is a question to another machine.
_PART = 1024
_THREADS = 16


class Remembered(NamedTuple):
    """Where an index lies on the disk, its checksum, and whether it is of class folders alone."""

    file: str
    checksum: int
    classes: bool


@dataclass
class Index:
    """Image files under `top` in the order of `walk`, each a number.

    Attributes:
        top: absolute path of the folder.
        tables: names of files and folders.
        left_out: links that lead out and were not followed.
        remembered: the file that `tables` is mapped from, if any.
    """

    top: str
    tables: Tables
    left_out: tuple[str, ...] = ()
    remembered: Remembered | None = None

    def __len__(self) -> int:
        return len(self.tables.files)

    def path(self, number: int) -> str:
        """Absolute path of a file.

        Raises:
            DataError: the index was tampered with, and the path would lead out of the folder.
        """
        name = self.tables.files[number]
        if b"\0" in name or b"/../" in b"/%b/" % name or name[:1] in (b"", b"/"):
            assert self.remembered, "no walk finds such a name"
            raise DataError(
                f"the index of {self.top} names {name!r}, which is not in it; delete {self.remembered.file}"
            )
        return os.path.join(self.top, os.fsdecode(name))

    def classes(self) -> dict[str, tuple[int, int]]:
        """First file of each folder that lies in the top, and the first after it, by name.

        Ranges leave no gap where the index was made of such folders alone.
        """
        folders = self.tables.folders
        every = ((i, folders[i]) for i in range(len(folders)))
        starts = {os.fsdecode(name): int(self.tables.first[i]) for i, name in every if name and b"/" not in name}
        return dict(zip(starts, pairwise([*starts.values(), len(self)]), strict=True))

    def is_current(self) -> bool:
        """Whether every folder is as it was listed."""
        folders, states = self.tables.folders, self.tables.states

        def unchanged(start: int) -> bool:
            rows = range(start, min(start + _PART, len(folders)))
            try:
                return all(
                    state_of(os.path.join(self.top, os.fsdecode(folders[i]))) == tuple(states[i].tolist()) for i in rows
                )
            except (OSError, ValueError):  # gone, or no path at all
                return False

        starts = range(0, len(folders), _PART)
        if len(starts) <= 1:
            return all(map(unchanged, starts))
        with ThreadPoolExecutor(_THREADS) as pool:
            return all(pool.map(unchanged, starts))

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is not a fork maps the same file again; names that lie in memory travel.
        if self.remembered:
            return _arrived, (self.top, self.remembered)
        return Index, (self.top, self.tables, self.left_out)


class Paths(Sequence[str]):
    """Absolute paths of an index's files, or of some of them; each is put together when it is asked for.

    Args:
        index: all of them.
        rows: `[n]` ascending numbers of those that are meant; None for all.
    """

    def __init__(self, index: Index, rows: Int64 | None = None) -> None:
        self._index, self._rows = index, rows

    def __len__(self) -> int:
        return len(self._index) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        """One path, or a list of them."""
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        number = range(len(self))[key]
        return self._index.path(number if self._rows is None else int(self._rows[number]))

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """Position of a path, found by halving.

        Raises:
            ValueError: it is not among them.
        """
        # Names in one folder are sorted, so paths are, part by part.
        at = bisect_left(self, value.split("/"), start, len(self) if stop is None else stop, key=lambda p: p.split("/"))
        if at < len(self) and self[at] == value:
            return at
        raise ValueError(f"{value} is not in the list")


def open_index(top: Path, root: Path, classes: bool = False) -> Index:
    """The index of a folder: the remembered one while it holds, otherwise of a walk, which is remembered.

    Args:
        top, root, classes: see `walk`.

    Raises:
        DataError: a folder cannot be listed.
    """
    identity = identity_of(top, classes)
    file = indexfile.place(identity)
    if file is not None:
        try:
            tables, checksum = indexfile.load(file, identity)
            index = Index(str(top), tables, remembered=Remembered(file, checksum, classes))
            if index.is_current():
                indexfile.touch(file)
                return index
        except (OSError, Damaged):
            pass
    index, lasting = _listed(top, root, classes)
    if file is not None and lasting:
        try:
            checksum = indexfile.save(file, identity, index.tables)
            return _mapped(index.top, Remembered(file, checksum, classes))  # and what the walk took is given back
        except (OSError, Damaged):
            pass
    return index


def identity_of(top: Path, classes: bool = False) -> bytes:
    """All that an index depends on beside what lies in the folder; without links, the root is not of it."""
    return b"\0".join([os.fsencode(top), b"classes" if classes else b"all", ",".join(EXTENSIONS).encode()])


def _mapped(top: str, remembered: Remembered) -> Index:
    return Index(top, indexfile.remap(remembered.file, remembered.checksum), remembered=remembered)


def _arrived(top: str, remembered: Remembered) -> Index:
    """The same index in another process.

    Another computer may share the cache and have other folders of that name, so its index may have taken the place.

    Raises:
        DataError: the folder has changed since.
    """
    try:
        return _mapped(top, remembered)
    except (OSError, Damaged):
        index, _ = _listed(Path(top), Path(top), remembered.classes)
        if indexfile.checksum_of(identity_of(Path(top), remembered.classes), index.tables) != remembered.checksum:
            raise DataError(f"{top} changed while loader processes were started; start again") from None
        return index


@dataclass
class _Builder:
    files: bytearray = field(default_factory=bytearray)
    folders: bytearray = field(default_factory=bytearray)
    count: int = 0
    first: list[int] = field(default_factory=list)
    states: list[State] = field(default_factory=list)


def _listed(top: Path, root: Path, classes: bool) -> tuple[Index, bool]:
    """The index of a walk, and whether it can be remembered."""
    built, left_out, lasting = _Builder(), [], True
    for item in walk(str(top), str(root), classes):
        match item:
            case Files(folder, names):
                prefix = f"{folder}/" if folder else ""
                built.files += os.fsencode(prefix + f"\0{prefix}".join(names) + "\0")
                built.count += len(names)
            case Folder(path, state, settled):
                built.folders += os.fsencode(path + "\0")
                built.first.append(built.count)
                built.states.append(state)
                lasting = lasting and settled
            case Link(path, leads_out):
                lasting = False
                left_out += [path] if leads_out else []
    tables = Tables.of(built.files, built.folders, built.first, built.states)
    return Index(str(top), tables, tuple(left_out)), lasting
