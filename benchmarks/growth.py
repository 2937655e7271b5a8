"""How a run grows: `python benchmarks/growth.py`.

Epochs: a run of one epoch of so many images, each read from a file of its own, as seconds an image of its steps and as
the memory of its process. Resumes: a run of so many steps, all of them recorded, is continued for one step more; the
seconds from the call to the end of that step, and the size of what it reads. Every run is a process of its own, on a
model that is small enough for what is around the steps to show.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import table

HERE = Path(__file__).resolve().parents[1]
MB = 1e6
BATCH = 20
TINY = f"""
model: {{encoder_type: vit, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
data: {{image_size: 32, decode_size: 32, num_workers: 0, batch_size: {BATCH}}}
evaluation: {{eval_frequency: 0}}
logging: {{use_tensorboard: true, use_report: false, log_frequency: 1}}
device: cpu
"""
TRAIN = """
import sys
from hjepa.cli import main
from hjepa.device import peak_memory
import torch
sys.argv = ["hjepa", *sys.argv[1:]]
try:
    main()
finally:
    print("peak", peak_memory(torch.device("cpu")))
"""


def train(folder: Path, *words: str) -> float:
    """Memory of `hjepa train` at its peak, in bytes; the run is a folder in `folder`."""
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, "train", str(config), *words],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout.split()[-1])


def make_images(folder: Path, count: int) -> None:
    """Files of noise of 32 x 32."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"{number // 1000:03d}"
        place.mkdir(exist_ok=True, parents=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.jpg")


def epochs(sizes: list[int], rounds: int) -> list[list[str]]:
    """A row for each number of images."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as made:
            make_images(Path(made, "images"), size)
            seconds, peaks = [], []
            for turn in range(rounds):
                run = Path(made, f"run{turn}")
                source = f"data.datasets=[{{name: folder, path: {made}/images}}]"
                peaks.append(train(Path(made), source, "training.epochs=1", f"experiment.output_dir={run}"))
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                rates = [line["images_per_second"] for line in lines[2:] if "images_per_second" in line]
                seconds.append(sum(1 / rate for rate in rates) / len(rates))
            an_image = statistics.median(seconds)
            rows.append(
                [
                    f"{size:,}",
                    f"{1e3 * an_image:.2f} ms ({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})",
                    f"{an_image * size:.1f} s",
                    f"{statistics.median(peaks) / MB:.0f} MB",
                ]
            )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def resumes(lengths: list[int], rounds: int) -> list[list[str]]:
    """A row for each number of steps."""
    rows = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as made:
            words = ["data.datasets=[{name: shapes, length: 1000}]", "checkpoint.save_frequency=0"]
            words += ["training.epochs=1000", f"experiment.output_dir={made}/run"]
            train(Path(made), *words, f"training.max_steps={length}")
            record = Path(made, "run", "metrics.jsonl").stat().st_size
            seconds = []
            for turn in range(1, rounds + 1):
                start = time.perf_counter()
                train(Path(made), *words, f"training.max_steps={length + turn}", "--resume")
                seconds.append(time.perf_counter() - start)
        middle = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        rows.append([f"{length:,}", middle, f"{record / 1e3:.0f} kB"])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000, 16_000])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(table(["images", "a step's time by its images", "an epoch", "memory"], epochs(given.images, given.rounds)))
    print()
    print(table(["steps so far", "one step more, from the call on", "record"], resumes(given.steps, given.rounds)))


if __name__ == "__main__":
    main()
