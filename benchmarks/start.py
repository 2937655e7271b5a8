"""How long until something happens, and in how much memory: `python benchmarks/start.py`.

Commands: from the call to its end; `hjepa train` to the first line of its record.

Opening: `FolderSource` in a process of its own, 1000 files a folder (100 where there are 1000 in all), empty, since
nothing looks inside. The first time there is no index, later there is. Where more images are asked for than files are
made (`--files`), the index is written from made-up names, and opening it is what is timed. Memory is what the process
holds after it minus what it held before, and at its peak.

Positions: which images a batch of 256 consists of, at the middle of an epoch of that many.

    python benchmarks/start.py --files 1000000
    python benchmarks/start.py --against ../older      # its opening beside ours, in turns
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tables import table

HERE = Path(__file__).resolve().parents[1]
MB = 1e6
SETTLING = 2.1  # seconds until a folder that changed is believed
BATCH = 256

OPEN = """
import json, os, resource, sys, time
from hjepa.data.files import FolderSource

def resident(key):
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    except FileNotFoundError:  # no Linux: the peak stands for both
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

before, start = resident("VmRSS"), time.perf_counter()
source = FolderSource(sys.argv[1], 32)
seconds = time.perf_counter() - start
after, peak = resident("VmRSS"), resident("VmHWM")
start = time.perf_counter()
for i in range(0, len(source), max(1, len(source) // 1000)):
    source.paths[i]
path = (time.perf_counter() - start) / min(1000, len(source))
facts = {"seconds": seconds, "resident": after - before, "peak": peak - before, "path": path, "images": len(source)}
print(json.dumps(facts))
"""

CHECK = ("-m", "hjepa", "check", str(HERE / "configs" / "quickstart.yaml"))
TINY = (
    "model.encoder_type=vit",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "data.datasets=[{name: shapes, length: 1000}]",
    "data.image_size=64",
    "data.batch_size=16",
    "training.epochs=1",
    "training.max_steps=1",
    "evaluation.eval_frequency=0",
    "logging.use_tensorboard=false",
    "logging.log_frequency=1",
    "device=cpu",
)


def environment(package: Path, cache: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache)}


def median(action: Callable[[], float], rounds: int) -> str:
    action()  # once without counting: bytecode is compiled, files are in the system's memory
    taken = sorted(action() for _ in range(rounds))
    return f"{statistics.median(taken):.2f} s ({taken[0]:.2f} to {taken[-1]:.2f})"


def call(command: list[str], env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(env: dict[str, str]) -> float:
    """Seconds until the record of a run has a line."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "run", "metrics.jsonl")
        words = [*TINY, f"experiment.output_dir={record.parent}"]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "hjepa", "train", *words], env=env, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (record.exists() and record.stat().st_size):
            time.sleep(0.002)
        taken = time.perf_counter() - start
        if process.wait():
            raise SystemExit("hjepa train failed")
    return taken


def make_files(root: Path, count: int) -> None:
    size = 1000 if count >= 10_000 else 100
    for number in range(count // size):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for i in range(size):
            os.close(os.open(folder / f"n{number:08d}_{i * 7919 % 100_000}.JPEG", os.O_CREAT | os.O_WRONLY))


def pretend(root: Path, count: int, cache: Path) -> None:
    """Write the index of a folder that has this many images by name only."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    from hjepa.data.index import identity_of
    from hjepa.data.indexfile import Tables, place, save
    from hjepa.data.walk import state_of

    files, folders, states = bytearray(), bytearray(b"\0"), []
    for number in range(count // 1000):
        name = f"n{number:08d}"
        (root / name).mkdir(parents=True)
        folders += name.encode() + b"\0"
        files += b"".join(b"%b/%b_%d.JPEG\0" % (name.encode(), name.encode(), i + 10_000) for i in range(1000))
    states = [state_of(str(root)), *(state_of(str(root / f"n{number:08d}")) for number in range(count // 1000))]
    first = [0, *range(0, count, 1000)]
    file = place(identity_of(root))
    assert file is not None
    save(file, identity_of(root), Tables.of(files, folders, first, states))


def opened(root: Path, package: Path, cache: Path) -> dict[str, Any]:
    """What one process says of opening a folder."""
    command = [sys.executable, "-c", OPEN, str(root)]
    # In its own folder, which comes before the path of packages.
    done = subprocess.run(
        command, cwd=package, env=environment(package, cache), check=True, capture_output=True, text=True
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def opening(count: int, real: bool, packages: dict[str, Path], rounds: int, disk: Path | None) -> list[list[str]]:
    """A row for each package and start."""
    with tempfile.TemporaryDirectory(dir=disk) as made:
        root, cache = Path(made).resolve() / "images", Path(made).resolve() / "cache"
        first: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
        second: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
        if real:
            make_files(root, count)
            time.sleep(SETTLING)
        else:
            packages = {"this": packages["this"]}
            pretend(root, count, cache)
        for turn in range(rounds + 1):
            for name, package in packages.items():
                if real:
                    shutil.rmtree(cache, ignore_errors=True)
                    first[name].append(opened(root, package, cache))
                second[name].append(opened(root, package, cache))
            if not turn:  # the first turn finds the disk cold
                for known in (first, second):
                    known.update({name: [] for name in known})
        rows = []
        for name in packages:
            for which, facts in (("first", first[name]), ("later", second[name])):
                if facts:
                    assert all(fact["images"] == count for fact in facts)
                    middle = {key: statistics.median(fact[key] for fact in facts) for key in facts[0]}
                    rows.append(
                        [
                            f"{count:,}" + ("" if real else " (by name)"),
                            name,
                            which,
                            f"{1e3 * middle['seconds']:,.1f} ms",
                            f"{1e6 * middle['seconds'] / count:.3f} us",
                            f"{middle['resident'] / MB:.1f} MB",
                            f"{max(0, middle['peak']) / MB:.1f} MB",
                            f"{1e6 * middle['path']:.1f} us",
                        ]
                    )
        return rows


def positions(count: int, rounds: int = 200) -> list[str]:
    """Time and memory of choosing a batch of so many images."""
    from hjepa.data.mixture import Mixture

    mixture = Mixture([count], [1.0], "concat", None, seed=0)
    place = np.arange(count // 2, count // 2 + BATCH)
    epoch = np.zeros_like(place)
    mixture.locate(epoch, place)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        mixture.locate(epoch, place)
        taken.append(time.perf_counter() - start)
    tracemalloc.start()
    mixture.locate(epoch, place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [f"{count:,}", f"{1e6 * statistics.median(taken):.0f} us", f"{peak / 1e3:.0f} kB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="most files that are made")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**power for power in range(3, 8)], help="images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are made and removed; the system's when not given")
    parser.add_argument("--against", type=Path, help="another checkout, whose opening is timed as well")
    parser.add_argument("--only", choices=["commands", "opening", "positions"])
    given = parser.parse_args()
    if given.only in (None, "commands"):
        with tempfile.TemporaryDirectory() as cache:
            env = environment(HERE, Path(cache))
            python = [sys.executable]
            rows = [
                ["`hjepa --help`", median(lambda: call([*python, "-m", "hjepa", "--help"], env), given.rounds)],
                ["`import hjepa`", median(lambda: call([*python, "-c", "import hjepa"], env), given.rounds)],
                ["`import torch`", median(lambda: call([*python, "-c", "import torch"], env), given.rounds)],
                ["`hjepa check configs/quickstart.yaml`", median(lambda: call([*python, *CHECK], env), given.rounds)],
                ["`hjepa train` to its first step", median(lambda: first_step(env), given.rounds)],
            ]
        print(table(["command", f"median of {given.rounds} (range)"], rows), end="\n\n", flush=True)
    if given.only in (None, "opening"):
        packages = {"this": HERE} | ({} if given.against is None else {"other": given.against.resolve()})
        rows = []
        for count in given.sizes:
            rows += opening(count, count <= given.files, packages, given.rounds, given.folder)
        head = ["images", "package", "start", "opening", "an image", "resident", "peak", "one path"]
        print(table(head, rows), end="\n\n", flush=True)
    if given.only in (None, "positions"):
        head = ["images of an epoch", f"a batch of {BATCH}", "memory"]
        print(table(head, [positions(10**power) for power in (3, 6, 9)]))


if __name__ == "__main__":
    main()
