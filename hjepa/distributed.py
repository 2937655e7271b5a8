"""What processes of one run need to know of each other: their parts of a batch, and that one of them has failed."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.nn.functional import all_gather

from hjepa.errors import ProcessError, UserError

# Time for a process to end by itself, after another one has failed.
GRACE = 5.0
POLL = 0.5

T = TypeVar("T")

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within, `gather_batch` waits for nobody: for trials that each process makes by itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def gather_batch(x: Tensor, dim: int) -> Tensor:
    """Join the processes' parts of a batch along `dim`, with gradients; alone, return `x`.

    Every process then computes the same statistic of the whole batch. The backward pass sums the processes'
    gradients into each part, and data parallelism averages over processes, so the gradient is that of one process
    holding the whole batch.
    """
    if _is_one():
        return x
    return torch.cat(tuple(all_gather(x.contiguous())), dim=dim)


def any_of(flags: Tensor) -> Tensor:
    """Which of these flags `[n]` are set on any process; nobody waits on the host, as Fabric's sum would."""
    total = flags.float()
    if not _is_one():
        dist.all_reduce(total)
    return total > 0


def gather_objects(items: list[T]) -> list[T]:
    """Join the processes' lists, in the order of the processes; every process calls it and gets the whole."""
    if _is_one():
        return items
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


@contextmanager
def ending_together() -> Iterator[None]:
    """Within, no process waits for one that has failed.

    A process that fails says so in the store where the processes have met. Each of the others reads it in a thread,
    since its main thread may be waiting where no signal reaches it, and ends with the same exit code.

    Raises:
        ProcessError: when what failed here is the connection to a process that has ended.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    # A connection of its own: one that waits lets nobody else speak.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, timeout=timedelta(minutes=1), wait_for_workers=False)
    key = f"hjepa/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    rank, over = dist.get_rank(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, key, rank, over), daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        if code > 128:  # stopped by a signal, which the others get as well
            raise
        lost = not isinstance(error, UserError) and _is_lost_connection(error)
        text = "lost the connection to another process" if lost else (str(error).strip() or type(error).__name__)
        word = json.dumps({"rank": rank, "code": code, "text": text.splitlines()[0]})
        try:
            first = json.loads(store.compare_set(key, "", word))
        except (dist.DistError, RuntimeError):  # the store went with its process
            first = json.loads(word)
        if not lost:
            raise
        raise _ended(first, rank) from error
    finally:
        over.set()
        watcher.join(GRACE)


def _watch(store: TCPStore, key: str, rank: int, over: threading.Event) -> None:
    """End this process some time after another one said that it failed."""
    try:
        while not over.wait(POLL):
            if store.check([key]):
                break
        else:
            return
        first = json.loads(store.get(key))
    except (dist.DistError, RuntimeError):
        return  # a store that does not answer is no failure of a process
    if not over.wait(GRACE):
        error = _ended(first, rank)
        # No traceback, no farewell: the main thread cannot be reached.
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def _ended(first: dict[str, int | str], rank: int) -> ProcessError:
    """What a process says that ends because of another one."""
    which = "another process" if first["rank"] == rank else f"process {first['rank']}"
    reason = "is gone" if first["rank"] == rank else f"failed: {first['text']}"
    return ProcessError(
        f"process {rank}: {which} {reason}; the run goes on from its last checkpoint with --resume", int(first["code"])
    )


def _is_lost_connection(error: Exception) -> bool:
    """Whether an operation between processes failed because one of them has ended; gloo has no error of its own."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "closed by peer"))


def _is_one() -> bool:
    return _alone or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
