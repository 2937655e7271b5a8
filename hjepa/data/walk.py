"""A walk through a folder of images, in an order that depends on names alone."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hjepa.errors import DataError

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
LOOKED_FOR = f"{', '.join(EXTENSIONS)}; hidden files and links that lead out of the folder are left out"

# A file system's clock ticks: what happens to a folder twice within a tick leaves one time. FAT has the coarsest, 2 s.
_TICK_NS = 2 * 10**9
_LARGEST = 2**63 - 1

State = tuple[int, int, int]
"""Times of a folder's last change, of its list of names and of anything, in ns, and its inode; as int64 holds them."""


class Folder(NamedTuple):
    """A folder that is about to be listed.

    Attributes:
        path: relative to the top of the walk, "" for the top.
        state: see `State`; read before the list, so a change in between is seen as one later.
        settled: whether any later change will show in the state.
    """

    path: str
    state: State
    settled: bool


class Link(NamedTuple):
    """A symbolic link: its absolute path, and whether it leads out of the folder of the images."""

    path: str
    leads_out: bool


class Files(NamedTuple):
    """Image files of one folder that follow one another in the walk, their names sorted."""

    folder: str
    names: list[str]


def state_of(path: str) -> State:
    """Of a folder.

    Raises:
        OSError: it is gone.
    """
    stat = os.stat(path)
    # A strange clock or a large inode must not be more than an int64 holds.
    return stat.st_mtime_ns & _LARGEST, stat.st_ctime_ns & _LARGEST, stat.st_ino & _LARGEST


def walk(top: str, root: str, classes: bool = False) -> Iterator[Folder | Link | Files]:
    """What lies under `top`, by sorted name, depth first; files and folders of one folder stand in one order.

    Hidden names are passed over, and links that lead to nothing, back up, or out of `root`. A linked folder is not
    entered: what lies inside the root is found where it lies.

    Args:
        top: absolute path.
        root: the folder of the images, that `top` is or lies in.
        classes: look into the folders in `top` alone, those that are links as well.

    Raises:
        DataError: a folder cannot be listed.
    """
    pending: list[str | Files] = [""]
    while pending:
        item = pending.pop()
        if isinstance(item, Files):
            yield item
            continue
        path = os.path.join(top, item) if item else top
        try:
            now, state = time.time_ns(), state_of(path)
            files, folders, links = _listed(path)
        except OSError as error:
            raise DataError(f"cannot list the folder {path}: {error.strerror}") from error
        yield Folder(item, state, max(state[:2]) < now - _TICK_NS)
        if classes and not item:
            files.clear()
        for name in sorted(links):
            target = os.path.join(path, name)
            leads_out = not inside(target, root)
            yield Link(target, leads_out)
            if leads_out or _is_circle(target, path):
                continue
            if classes and not item:
                folders += [name] if os.path.isdir(target) else []
            elif name.lower().endswith(EXTENSIONS) and os.path.isfile(target):
                files.append(name)
        files.sort()
        folders.sort()
        # What comes last is put down first: a stack, since a tree can be deeper than Python's own.
        end = len(files)
        for name in reversed(folders):
            start = bisect_left(files, name, hi=end)
            if start < end:
                pending.append(Files(item, files[start:end]))
            pending.append(f"{item}/{name}" if item else name)
            end = start
        if end:
            pending.append(Files(item, files[:end]))


def class_names(folder: Path, root: Path) -> list[str]:
    """Folders that lie in this one, sorted, links to folders included; see `walk`.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        _, names, links = _listed(str(folder))
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
    for name in links:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and inside(path, root) and not _is_circle(path, folder):
            names.append(name)
    return sorted(names)


def has_two(folder: Path, root: Path) -> bool:
    """Whether there are two images under a folder; looks no further than the second."""
    found = (name for item in walk(str(folder), str(root)) if isinstance(item, Files) for name in item.names)
    return len(list(islice(found, 2))) == 2


def inside(path: str | Path, folder: str | Path) -> bool:
    """Whether the one lies in the other, or is it, once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _listed(path: str) -> tuple[list[str], list[str], list[str]]:
    """Names of the image files, folders and links in a folder, without hidden ones, in no order.

    The list of a folder says what each name is on most file systems, so that nothing is asked for each.
    """
    files: list[str] = []
    folders: list[str] = []
    links: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if name.lower().endswith(EXTENSIONS) and entry.is_file(follow_symlinks=False):
                files.append(name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_symlink():
                links.append(name)
    return files, folders, links


def _is_circle(link: str, folder: str | Path) -> bool:
    """Whether a link leads to nothing, to itself, or to a folder that the one it lies in is in."""
    return not os.path.exists(link) or inside(folder, link)
