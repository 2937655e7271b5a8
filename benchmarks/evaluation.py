"""What probes cost: `python benchmarks/evaluation.py`.

k-NN and linear probe on random features of growing banks, each in a process of its own, with the memory that they take
beside the features themselves; and a plain k-NN that holds all similarities of a block of queries at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from tables import GB, table
from torch import Tensor

from hjepa.device import forget_peak, peak_memory, resident_memory
from hjepa.evaluation.probes import linear_probe, nearest

CPU = torch.device("cpu")
K, CLASSES = 20, 10


def plain(bank: Tensor, queries: Tensor) -> None:
    """All similarities of 256 queries, then the best."""
    bank = torch.nn.functional.normalize(bank, dim=1)
    for block in torch.nn.functional.normalize(queries, dim=1).split(256):
        (block @ bank.T).topk(K, dim=1)


def measure(what: str, rows: int, width: int, queries: int) -> dict[str, float]:
    """Seconds, and bytes beside the features."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(rows, width, generator=generator)
    asked = torch.randn(queries, width, generator=generator)
    labels, wanted = torch.arange(rows) % CLASSES, torch.arange(queries) % CLASSES
    parts: dict[str, Callable[[], object]] = {
        "k-NN": lambda: nearest(bank, asked, K),
        "k-NN, plain": lambda: plain(bank, asked),
        "linear": lambda: linear_probe(bank, labels, asked, wanted, l2=[1e-4, 1e-2, 1.0], num_classes=CLASSES, seed=0),
    }
    nearest(bank[:64], asked[:64], K)  # libraries load their kernels
    forget_peak(CPU)
    before, start = resident_memory(), time.perf_counter()
    parts[what]()
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory(CPU) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5, help="of banks of fewer than 10^6 rows; one of larger ones")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.width, args.queries)))
        return
    lines = []
    for rows in args.rows:
        for what in ("k-NN", "k-NN, plain", "linear"):
            command = [sys.executable, __file__, "--width", str(args.width), "--queries", str(args.queries)]
            command += ["--one", what, str(rows)]
            count = args.rounds if rows < 10**6 else 1
            found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(count)]
            seconds, most = (sorted(run[key] for run in found)[count // 2] for key in ("seconds", "bytes"))
            bank = f"{4 * rows * args.width / GB:.2f}"
            lines.append([what, f"{rows} x {args.width}", bank, f"{seconds:.2f}", f"{most / GB:.2f}"])
    print(table(["probe", "bank", "GB of bank", "seconds", "GB beside it"], lines))


if __name__ == "__main__":
    main()
