"""Train, with no memory left for another step after the first checkpoint; or, by `limit=<bytes>`, with so much in all.

The limit that was set is printed; the kernel enforces it.
"""

import resource
import sys
from pathlib import Path

import torch

import hjepa.fabric
import hjepa.train
from hjepa.cli import main
from hjepa.run import Run

torch.set_num_threads(1)
SPARE = 80 << 20  # a step of the test takes some 180 MB beyond what is held at the save, half of it 40 MB
limit, *words = sys.argv[1:]
save = hjepa.train.save
assert hjepa.fabric.keep_freed_memory  # or the next line replaces what nobody calls
hjepa.fabric.keep_freed_memory = lambda: False  # so that every step has to ask anew


def confine(size: int) -> None:
    print(f"limit={size}", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def save_and_confine(run: Run, wait: bool = False) -> None:
    global limit
    save(run, wait=True)
    if limit == "after-save":
        limit = "set"
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        confine(pages * resource.getpagesize() + SPARE)


if limit == "after-save":
    hjepa.train.save = save_and_confine
else:
    confine(int(limit.removeprefix("limit=")))
sys.argv = ["hjepa", *words]
main()
