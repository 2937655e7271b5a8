"""Checkpoints written while the run goes on."""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from hjepa import checkpoint


class Writer:
    """Writes a run's checkpoints in the background, one at a time: a step waits for a copy of the state, no more.

    A write that failed is told at the next call, whichever it is.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Take over a folder and sweep out what interrupted saves left there.

        Args:
            folder: of the checkpoints.
            keep: how many of them, the newest first.
        """
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        checkpoint.prune(folder, sys.maxsize)

    def submit(self, step: int, weights: dict[str, Tensor], trainer: dict[str, Any], config: dict[str, Any]) -> None:
        """Copy the state and write it as `checkpoint.save` does, after the write before it."""
        self.wait()
        if not checkpoint.path_of(self.folder, step).exists():
            self._pending = self._thread.submit(
                self._write, step, checkpoint.snapshot(weights), checkpoint.snapshot(trainer), config
            )

    def _write(self, step: int, *state: dict[str, Any]) -> None:
        checkpoint.save(self.folder, step, *state)
        checkpoint.prune(self.folder, self.keep)

    def check(self) -> None:
        """Tell a failure as soon as there is one.

        Raises:
            StorageError: of the write.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until everything handed in lies on the disk; raises as `check` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the write that goes on come to its end; what it has to say is not asked for."""
        self._thread.shutdown(wait=True)
