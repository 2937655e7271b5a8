"""Being asked to stop: by the machine (SIGTERM, SIGUSR1) or by the person at the keyboard (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from hjepa.errors import StoppedError

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """While it is entered, a signal is remembered until the step is done; a second Ctrl-C stops at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.

    Attributes:
        received: the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received == number == signal.SIGINT
        self.received = self.received or number
        if again:
            raise KeyboardInterrupt
        if self._at_once:
            raise self.reason()

    def reason(self) -> StoppedError:
        """What ends the run."""
        return StoppedError(signal.Signals(self.received) if self.received else signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what can be left in the middle, as all is saved: a signal ends it.

        Raises:
            StoppedError: in the middle, or before the beginning.
        """
        if self.received:
            raise self.reason()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


class LateReader:
    """Reads flags from a device some steps after they were computed, so that no step waits for one."""

    LAG = 2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: deque[tuple[Tensor, Any]] = deque()

    def read(self, flag: Tensor) -> bool:
        """Hand in this step's flag (0-d, on the device), read that of `LAG` steps ago; on a CPU, this step's."""
        if self.device.type != "cuda":
            return bool(flag)
        there = torch.empty_like(flag, device="cpu", pin_memory=True)
        there.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((there, event))
        if len(self._waiting) <= self.LAG:
            return False
        value, arrived = self._waiting.popleft()
        arrived.synchronize()
        return bool(value)
