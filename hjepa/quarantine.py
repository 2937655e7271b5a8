"""What a run could not read: known to all its processes, written down in its folder."""

from __future__ import annotations

from collections.abc import Iterable

from hjepa.console import Console
from hjepa.data.bad_files import listed
from hjepa.data.files import FileSource
from hjepa.data.loader import Bad, Batches
from hjepa.data.source import Source
from hjepa.distributed import gather_objects
from hjepa.runfolder import BAD_IMAGES, RunFolder


class Quarantine:
    """The unreadable files of a run, of all sources and processes.

    Args:
        folder: the run's, on the first process; None writes nothing.
        console: where it is told.
        step: of the checkpoint that the run continues from, None for a new run. What was found after it will be found
            again.

    Attributes:
        found: reason by path of those that are written down.
    """

    def __init__(self, folder: RunFolder | None, console: Console, step: int | None = None) -> None:
        self.found: dict[str, str] = {} if folder is None else folder.open_bad_images(step)
        self._folder = folder
        self._console = console
        self._sources: list[FileSource] = []
        self._shared: set[Bad] = set()

    def watch(self, sources: Iterable[Source]) -> None:
        """Answer for these; files that an earlier process wrote down are looked at again, and mended ones go.

        Raises:
            DataError: when more than may be are still bad.
        """
        for source in sources:
            if isinstance(source, FileSource):
                self._sources.append(source)
                again = source.positions(self.found)
                if len(again):
                    source.read(again)
                mended = {source.paths[i] for i in again} - source.bad_files.found.keys()
                self.found = {path: reason for path, reason in self.found.items() if path not in mended}
                if mended and self._folder is not None:
                    self._folder.drop_bad_images(mended)

    def exchange(self, batches: Batches) -> None:
        """Let every process know what any could not read of the training images; all call it together.

        Raises:
            DataError: on all of them, when a source has more bad files than it may.
        """
        fresh = [bad for bad in batches.found() if bad not in self._shared]
        self._shared.update(fresh)
        batches.note(gather_objects(fresh))

    def write(self, step: int) -> None:
        """Write down what this process has learnt since, after so many steps of the run; the first is told."""
        known = {path: reason for source in self._sources for path, reason in source.bad_files.found.items()}
        new = {path: reason for path, reason in known.items() if path not in self.found}
        if not new:
            return
        if not self.found:
            where = f"; all are listed in {self._folder.path / BAD_IMAGES}" if self._folder is not None else ""
            self._console.warn(
                f"{len(new)} image file(s) cannot be read, others take their place: {listed(new)}{where}"
            )
        self.found |= new
        if self._folder is not None:
            self._folder.add_bad_images(step, new)
