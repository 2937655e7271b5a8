"""What saving and probing cost a run: `python benchmarks/checkpointing.py configs/quickstart.yaml training.lr=1e-3`.

Blocks of steps are timed in turns, without a save and with one before them, which is written while they are taken; the
difference is what one save costs, whoever pays for it: on a CPU in seconds of all its processors, so that other work on
the machine does not count. Beside it, how long the step is held for the copy. A probe is timed whole, baselines apart.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tables import table

from hjepa.config import load_config
from hjepa.console import Console
from hjepa.data.workers import Loader
from hjepa.device import synchronize
from hjepa.evaluate import build_evaluator, probe
from hjepa.evaluation.evaluator import Evaluator
from hjepa.fabric import open_fabric
from hjepa.optim import Schedules
from hjepa.run import build
from hjepa.step import take_step
from hjepa.writer import Writer

ROUNDS, BLOCK_SECONDS, PROBES = 7, 3.0, 5


def main() -> None:
    name, *settings = sys.argv[1:]
    asked = load_config(name, settings)
    config = load_config(name, [*settings, "evaluation.eval_frequency=0"])
    fabric, kind = open_fabric(config)
    with Console(enabled=False) as console, tempfile.TemporaryDirectory() as place:
        run = build(config, fabric, kind, console, sample=256)
        writer = Writer(Path(place), 2)
        run.model.train()
        per_epoch = run.batches.steps_per_epoch
        schedules = Schedules(config.training, config.model.ema, per_epoch, 1000 * per_epoch)
        batches = iter(Loader(run.batches, 0, 10**6, kind.pin_memory))

        clock = time.process_time if fabric.device.type == "cpu" else time.monotonic

        def block(steps: int) -> float:
            synchronize(fabric.device)
            start = clock()
            for _ in range(steps):
                take_step(run, schedules, 0, batches)
            synchronize(fabric.device)
            return clock() - start

        block(2)
        steps = max(4, round(BLOCK_SECONDS / (block(4) / 4)))
        plain, held, saved = [], [], []
        for number in range(ROUNDS):
            plain.append(block(steps))
            start, begun = time.monotonic(), clock()
            run.progress.step = number
            writer.submit(*run.state())
            held.append(time.monotonic() - start)
            block(steps)
            writer.wait()
            saved.append(clock() - begun)
        size = sum(file.stat().st_size for file in next(Path(place).glob("step-*")).iterdir())
        writer.close()
        evaluator = build_evaluator(asked, fabric.device)
        assert isinstance(evaluator, Evaluator)
        probes = []
        for _ in range(1 + PROBES):
            begun = clock()
            probe(evaluator, run.model, asked)
            synchronize(fabric.device)
            probes.append(clock() - begun)
    step = statistics.median(plain) / steps
    cost = statistics.median(b - a for a, b in zip(plain, saved, strict=True))
    epoch, whole = per_epoch * step, (asked.training.epochs or 1) * per_epoch * step
    seconds = "seconds of the processor" if fabric.device.type == "cpu" else "seconds"
    first, later = probes[0], statistics.median(probes[1:])
    count = max(1, (asked.training.epochs or 1) // max(1, asked.evaluation.eval_frequency))
    rows = [
        ["a step", f"{step:.3f}", "", ""],
        [f"an epoch of {per_epoch} steps", f"{epoch:.1f}", "", ""],
        ["a save", f"{cost:.3f}", f"{1e3 * statistics.median(held):.1f} ms", f"{100 * cost / epoch:.2f} % of an epoch"],
        ["the first probe, with its baselines", f"{first:.2f}", "all of it", ""],
        ["a later probe", f"{later:.2f}", "all of it", f"{100 * later / epoch:.1f} % of an epoch"],
        [
            f"all {count} of this config",
            f"{first + (count - 1) * later:.2f}",
            "",
            f"{100 * (first + (count - 1) * later) / whole:.1f} % of the steps",
        ],
    ]
    print(f"{name}: {fabric.device}, {size / 1e6:.1f} MB a checkpoint\n")
    print(table(["what", seconds, "holds the step for", "share"], rows))


if __name__ == "__main__":
    main()
