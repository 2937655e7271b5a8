"""Images in one order, read piece by piece: a folder, or the sources of a config."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hjepa.config import resolve
from hjepa.config.data import Data
from hjepa.data.files import FileSource, FolderSource
from hjepa.data.source import Bool, Int64, Read, Source
from hjepa.data.sources import decode_side, open_source
from hjepa.errors import ConfigError
from hjepa.weights import Weights

CHOICE = ("data.datasets", "data.data_path", "data.download")
# What settles how images are read; the rest of a run's config may not fit other images.
_SECTIONS = ("experiment", "model", "data", "masking", "loss", "training")


class Piece(NamedTuple):
    """Some images of one source.

    Attributes:
        numbers: `[n]` int64 in the listing.
        readable: `[n]` bool; another image stands in the place of one that cannot be read, and here that is nobody's.
        read: what was read.
    """

    numbers: Int64
    readable: Bool
    read: Read


@dataclass(frozen=True)
class Listing:
    """Images in one order.

    Attributes:
        sources: where they are read.
        names: of all of them.
        words: what they are called in the header.
        digest: of their names, sizes and times.
        labels: `[n]` int64, or None.
    """

    sources: Sequence[Source]
    names: Sequence[str]
    words: str
    digest: str
    labels: Int64 | None

    def read(self, start: int, stop: int) -> list[Piece]:
        """Images [start, stop), at most one piece per source."""
        found, first = [], 0
        for source in self.sources:
            indices = np.arange(max(start - first, 0), min(stop - first, len(source)), dtype=np.int64)
            if len(indices):
                read = source.read(indices)
                found.append(Piece(indices + first, read.indices == indices, read))
            first += len(source)
        return found


def pieces(listing: Listing, start: int, stop: int, batch_size: int) -> Iterator[Piece]:
    """Images [start, stop), a batch at a time; the next one is decoded while its reader is busy with this one."""
    bounds = [(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(listing.read, *bounds[0])
        for following in (*bounds[1:], None):
            found = upcoming.result()
            if following is not None:
                upcoming = reader.submit(listing.read, *following)
            yield from found


def list_folder(folder: Path, data: Data) -> Listing:
    """All images under a folder, however nested, by their names in it.

    Raises:
        DataError: when it is missing, or holds none.
    """
    source = FolderSource(folder, decode_side(data), str(folder), max_bad=1.0)
    root = str(folder.expanduser().absolute())
    names = [os.path.relpath(path, root) for path in source.paths]
    return Listing([source], names, root, _digest(names, [source]), None)


def list_sources(saved: Weights, words: Sequence[str]) -> Listing:
    """The sources that a run's config names, or those that `words` put in their place (see `CHOICE`).

    Raises:
        ConfigError: for a word that is about something else.
        DataError: when images are missing.
    """
    for word in words:
        # Nothing that says how an image is shown: that is the encoder's.
        if not word.startswith(CHOICE):
            raise ConfigError(f"{word!r}: an embed is free to choose {', '.join(CHOICE)} and no other setting")
    sections = {name: saved.config[name] for name in _SECTIONS}
    config = resolve(sections, words, f"config of {saved.path}")
    data = config.data.model_copy(update={"max_bad_fraction": 1.0})
    sources = [open_source(dataset, data, config.experiment.seed) for dataset in data.datasets]
    names = [source.place(i) for source in sources for i in range(len(source))]
    text = json.dumps([dataset.model_dump(mode="json", exclude_defaults=True) for dataset in data.datasets])
    # Classes of two sources would bear the same numbers.
    labels = sources[0].labels if len(sources) == 1 else None
    return Listing(sources, names, text, _digest(names, sources), labels)


def _digest(names: Sequence[str], sources: Sequence[Source]) -> str:
    digest = hashlib.sha256(json.dumps(names).encode())
    for source in sources:
        for path in source.paths if isinstance(source, FileSource) else ():
            try:
                status = os.stat(path)
            except OSError:  # it went after it was listed, and will be unreadable
                continue
            digest.update(f"{status.st_size} {status.st_mtime_ns},".encode())
    return digest.hexdigest()
