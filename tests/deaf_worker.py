"""The command line in a process that SIGTERM does not end, as a process is that waits inside a collective.

Its id is written to rank<r>.pid; `full=<step>` leaves the last process without memory in that step.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from hjepa.cli import main
from hjepa.data.loader import Batch
from hjepa.data.views import Views

torch.set_num_threads(1)
signal.signal(signal.SIGTERM, lambda *_: None)
out, full, *words = sys.argv[1:]
rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
(Path(out) / f"rank{rank}.pid").write_text(str(os.getpid()))
render, steps = Batch.render, 0


def counted(self: Batch, views: Views) -> torch.Tensor:
    global steps
    steps += 1
    if rank == last and full == f"full={steps - 1}":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return render(self, views)


Batch.render = counted  # type: ignore[method-assign]
sys.argv = ["hjepa", *words]
main()
