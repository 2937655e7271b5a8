"""Train, with no memory left for another step after the first checkpoint; or, by `limit=<bytes>`, with so much in all.

The limit that was set is printed; the kernel enforces it.
"""

import resource
import sys
from pathlib import Path

import torch

from hjepa import checkpoint
from hjepa.cli import main

torch.set_num_threads(1)
SPARE = 24 << 20
limit, *words = sys.argv[1:]
save = checkpoint.save


def confine(size: int) -> None:
    print(f"limit={size}", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def save_and_confine(*args: object) -> Path:
    path = save(*args)  # type: ignore[arg-type]
    if limit == "after-save":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        confine(pages * resource.getpagesize() + SPARE)
    return path


if limit == "after-save":
    checkpoint.save = save_and_confine
else:
    confine(int(limit.removeprefix("limit=")))
sys.argv = ["hjepa", *words]
main()
