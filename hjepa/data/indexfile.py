"""An index on the disk: one file in the user's cache, arrays that are mapped into memory as they lie.

    magic, checksum of the rest, sizes | states [F, 3], first [F], ends of folders [F] and files [N] | identity, names

All numbers are little-endian int64, all names end in NUL.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

_HEAD = struct.Struct("<8sQ")
_SIZES = struct.Struct("<5Q")  # folders, files, bytes of the identity, of the folders' names, of the files' names
_MAGIC = b"hjepaix1"
_LONG = np.dtype("<i8")
_BLOCK = 1 << 20
_UNUSED = 90 * 86400.0  # seconds after which an index that nobody opened is swept out


class Damaged(Exception):  # noqa: N818  # what it is, not an error of anybody's
    """A file that is no index, or not the one that was looked for."""


@dataclass
class Names:
    """Names by number.

    Attributes:
        text: all of them, each with a NUL at its end.
        ends: `[n]` where these are.
    """

    text: UInt8
    ends: Int64

    @classmethod
    def of(cls, text: bytearray) -> Names:
        """Names that end in NUL."""
        array = np.frombuffer(text, np.uint8)
        return cls(array, np.flatnonzero(array == 0).astype(_LONG, copy=False))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self.ends):
            raise IndexError(number)
        start = self.ends[number - 1] + 1 if number else 0
        return self.text[start : self.ends[number]].tobytes()


@dataclass
class Tables:
    """What an index holds.

    Attributes:
        files: paths relative to its top, in the order of the walk.
        folders: likewise, each before those in it; the first is the top, "".
        first: `[folders]` number of the first file that follows each folder.
        states: `[folders, 3]` see `walk.State`.
    """

    files: Names
    folders: Names
    first: Int64
    states: Int64

    @classmethod
    def of(
        cls, files: bytearray, folders: bytearray, first: Sequence[int], states: Sequence[tuple[int, int, int]]
    ) -> Tables:
        """From what a walk found."""
        shaped = np.asarray(states, _LONG).reshape(-1, 3)
        return cls(Names.of(files), Names.of(folders), np.asarray(first, _LONG), shaped)


def place(identity: bytes) -> str | None:
    """Where the index of this identity lies or would lie; None where there is no home to keep it in."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # as its specification has it
        home = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    if not os.path.isabs(home):
        return None
    return os.path.join(home, "hjepa", "index", hashlib.sha256(identity).hexdigest()[:32])


def save(file: str, identity: bytes, tables: Tables) -> int:
    """Write an index whole or not at all; its checksum.

    Raises:
        OSError: it cannot be written.
    """
    folder = os.path.dirname(file)
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep(folder)
    parts, checksum = _parts(identity, tables), checksum_of(identity, tables)
    descriptor, beside = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for part in (_HEAD.pack(_MAGIC, checksum), *parts):
                stream.write(part)
        # Not flushed to the disk: what a power cut leaves of it has another checksum.
        os.replace(beside, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    return checksum


def checksum_of(identity: bytes, tables: Tables) -> int:
    """CRC-32 of what `save` writes."""
    checksum = 0
    for part in _parts(identity, tables):
        checksum = zlib.crc32(part, checksum)
    return checksum


def load(file: str, identity: bytes) -> tuple[Tables, int]:
    """Map an index after it was read through once; the tables, and its checksum.

    Raises:
        OSError: there is none.
        Damaged: it is cut, changed, of another identity or of another user.
    """
    with open(file, "rb") as stream:
        if os.fstat(stream.fileno()).st_uid != os.getuid():
            raise Damaged(f"{file} is another user's")
        magic, checksum = _HEAD.unpack(_exactly(stream.read(_HEAD.size), _HEAD.size))
        found, block = 0, bytearray(_BLOCK)
        # Read, not mapped: so it does not count as memory of this process.
        while length := stream.readinto(block):
            found = zlib.crc32(memoryview(block)[:length], found)
    if magic != _MAGIC or found != checksum:
        raise Damaged(f"{file} is no index, or is not whole")
    tables, named = _map(file, checksum)
    if named != identity:
        raise Damaged(f"{file} is the index of something else")
    return tables, checksum


def remap(file: str, checksum: int) -> Tables:
    """Map an index that is known to be sound.

    Raises:
        OSError, Damaged: it is gone, or another one is in its place.
    """
    return _map(file, checksum)[0]


def touch(file: str) -> None:
    """Note that an index was used."""
    with suppress(OSError):
        os.utime(file)


def _map(file: str, checksum: int) -> tuple[Tables, bytes]:
    """Tables and identity of a file with this checksum, which is not computed here."""
    try:
        raw = np.asarray(np.memmap(file, np.uint8, "r"))
    except ValueError:  # empty
        raise Damaged(f"{file} is empty") from None
    head = _HEAD.size + _SIZES.size
    if _HEAD.unpack(_exactly(raw[: _HEAD.size].tobytes(), _HEAD.size)) != (_MAGIC, checksum):
        raise Damaged(f"{file} is another index than it was")
    f, n, *lengths = _SIZES.unpack(_exactly(raw[_HEAD.size : head].tobytes(), _SIZES.size))
    if len(raw) != head + 8 * (5 * f + n) + sum(lengths):
        raise Damaged(f"{file} has another size than it says")
    longs = raw[head : head + 8 * (5 * f + n)].view(_LONG)
    states, first, folder_ends, file_ends = np.split(longs, [3 * f, 4 * f, 5 * f])
    identity, folders, files = np.split(raw[len(raw) - sum(lengths) :], np.cumsum(lengths[:2]))
    if np.any(np.diff(first, prepend=0, append=n) < 0):
        raise Damaged(f"{file} has folders in no order")
    tables = Tables(Names(files, file_ends), Names(folders, folder_ends), first, states.reshape(-1, 3))
    return tables, identity.tobytes()


def _parts(identity: bytes, tables: Tables) -> list[bytes | memoryview]:
    """What follows the checksum in a file."""
    files, folders = tables.files, tables.folders
    sizes = _SIZES.pack(len(folders), len(files), len(identity), len(folders.text), len(files.text))
    arrays = (tables.states, tables.first, folders.ends, files.ends)
    numbers = [np.ascontiguousarray(array).data.cast("B") for array in arrays if array.size]
    return [sizes, *numbers, identity, folders.text.data, files.text.data]


def _exactly(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise Damaged("cut off")
    return data


def _sweep(folder: str) -> None:
    """Remove indices that nobody has opened for long, and what killed processes left half written."""
    for entry in os.scandir(folder):
        with suppress(OSError):
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > _UNUSED:
                os.unlink(entry.path)
