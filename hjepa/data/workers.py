"""Batches from loader processes, and what is said when one of these dies or hangs."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hjepa.data.loader import Bad, Batch, Batches
from hjepa.errors import DataError

# torch looks for dead processes as often as it gives up waiting, and a signal tells it only of its own children
# (those of a fork server are not).
_GLANCE = 5.0
# Seconds that a loader process goes on when it is asked to end.
_FAREWELL = 10


class _Failed(NamedTuple):
    """What a loader process hands over instead of a batch: an exception would arrive with its traceback as text."""

    message: str
    bad: list[Bad]


class _Reader(Dataset[Batch | _Failed]):
    """What loader processes run: the batches, with a note of the file that is being read.

    Args:
        batches: of the run.
        reading: `[workers, sources]` int64 in shared memory, see `Source.reading`.
    """

    def __init__(self, batches: Batches, reading: Tensor) -> None:
        self.batches = batches
        self.reading = reading

    def __getitem__(self, number: int) -> Batch | _Failed:
        worker = get_worker_info()
        if worker is not None:
            for s, source in enumerate(self.batches.sources):
                source.reading = self.reading[worker.id, s : s + 1].numpy()
        try:
            return self.batches[number]
        except DataError as error:
            return _Failed(str(error), self.batches.found())


class Loader(DataLoader[Batch]):
    """Batches of the steps [first_step, last_step), in order, from `data.num_workers` processes.

    Attributes:
        patience: seconds that a batch is waited for; 0 for ever.
    """

    def __init__(self, batches: Batches, first_step: int, last_step: int, pin_memory: bool) -> None:
        workers = batches.config.num_workers
        self.batches = batches
        self.patience = batches.config.timeout if workers else 0.0
        self.reading = torch.full((workers, len(batches.sources)), -1, dtype=torch.int64).share_memory_()
        super().__init__(
            _Reader(batches, self.reading),  # type: ignore[arg-type]  # __iter__ yields batches only
            batch_size=None,
            sampler=range(first_step * batches.parts, last_step * batches.parts),
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory and batches.config.pin_memory,
            timeout=min(self.patience, _GLANCE),
            worker_init_fn=_outlive_the_step,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches.

        Raises:
            DataError: when one cannot be made or does not come.
        """
        # At once, not with the first batch: torch draws a number from its generator here, which a step must not notice.
        return self._batches(super().__iter__())

    def _batches(self, items: Iterator[Any]) -> Iterator[Batch]:
        while (item := self._next(items)) is not None:
            if isinstance(item, _Failed):
                self.batches.note(item.bad)
                raise DataError(item.message)
            self.batches.note(item.bad)
            yield item

    def _next(self, items: Iterator[Batch | _Failed]) -> Batch | _Failed | None:
        """What comes next, None at the end."""
        started = time.monotonic()
        while True:
            try:
                return next(items, None)
            except (RuntimeError, OSError, EOFError) as error:
                if str(error).startswith("DataLoader timed out"):
                    if time.monotonic() - started >= self.patience:
                        raise DataError(self._hung()) from None
                elif not isinstance(error, RuntimeError) or "ancdata" in str(error):
                    # It died while it handed something over. The signal that says so comes within the second, and
                    # would otherwise find the main process at something else.
                    time.sleep(1)
                    raise DataError(_died(f"its connection broke ({error})")) from None
                else:
                    raise

    def _hung(self) -> str:
        sources = self.batches.sources
        busy = [(s, int(index)) for row in self.reading for s, index in enumerate(row) if index >= 0]
        names = [sources[s].place(index) for s, index in busy]
        what = f"still reading {' and '.join(names)}" if names else "none was reading a file"
        return (
            f"no batch came from the loader processes in {self.patience:g} s (data.timeout); {what}. Continue from the "
            "last checkpoint with --resume once that can be read, or with a larger data.timeout"
        )


@contextmanager
def watched() -> Iterator[None]:
    """Say in one line that a loader process has died.

    torch raises from a signal handler, so the main process may be anywhere when it learns of it.

    Raises:
        DataError: when one has.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(_died(str(error).splitlines()[0].removeprefix("DataLoader worker ").rstrip(". "))) from None


def _died(how: str) -> str:
    return (
        f"a loader process died: {how}. If the system killed it for memory, lower data.num_workers or data.cache_gb; "
        "continue from the last checkpoint with --resume"
    )


def _outlive_the_step(worker: int) -> None:
    """Leave it to the main process to stop: a terminal and a scheduler send their signals to the loaders as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # The main process ends stuck loaders by this one.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_FAREWELL))
    sys.excepthook = _leave_broken_connections_to_the_main_process


def _leave_broken_connections_to_the_main_process(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what was raised beside the batches, but not that the main process hung up: it says itself why it ends.

    The thread that hands over shared memory calls this for every connection that broke (`resource_sharer`).
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _as_is(batch: Any) -> Any:
    """Already whole; the default would turn tuples into lists."""
    return batch
