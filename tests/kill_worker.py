"""Kill a process again and again, at any moment; everything is imported once and every victim is a fork of that.

`kill_worker.py run <folder> <kills> <seed> <settings...>`: trains in `folder/whole` without a kill and in
`folder/parts` with so many, each victim resuming what the one before left. Prints the newest step on the disk after
each kill.

`kill_worker.py save <folder>`: kills a save, a sweep of older ones and a best one set apart at every system call of
theirs, and prints how many that were.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hjepa.train
from hjepa import checkpoint
from hjepa.config import load_config

torch.set_num_threads(1)


def fork(victim: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            victim()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def newest(folder: Path) -> int:
    found = checkpoint.find(folder / "checkpoints")
    return int(found[0].name.removeprefix("step-")) if found else 0


def kill_runs(folder: Path, kills: int, seed: int, settings: list[str]) -> None:
    def leg(name: str) -> Callable[[], None]:
        config = load_config(None, [*settings, f"experiment.output_dir={folder / name}"])
        return lambda: hjepa.train.train(config, resume=True) and None

    started = time.monotonic()
    pid = fork(leg("whole"))
    while not newest(folder / "whole"):
        time.sleep(0.005)
    first_save = time.monotonic() - started
    assert os.waitpid(pid, 0)[1] == 0

    choose, steps = random.Random(seed), []
    while len(steps) < kills:
        pid = fork(leg("parts"))
        time.sleep(choose.uniform(0, 2.5) * first_save)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, f"failed by itself: {status}"
        steps.append(newest(folder / "parts"))
        if status == 0 and len(steps) < kills:  # it came to its end first: the rest of the kills are for the next one
            compare(folder)
            shutil.rmtree(folder / "parts")
    assert os.waitpid(fork(leg("parts")), 0)[1] == 0
    compare(folder)
    print(json.dumps(steps))


def compare(folder: Path) -> None:
    """Weights, moments and counters to the bit, and the record but for its times."""
    whole, parts = (checkpoint.load_newest(folder / name / "checkpoints")[0] for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    for one in (whole, parts):
        one.trainer["progress"]["seconds"] = 0.0
    assert_same(whole.weights, parts.weights)
    assert_same(whole.trainer, parts.trainer)
    lines = []
    for name in ("whole", "parts"):
        text = (folder / name / "metrics.jsonl").read_text()
        timing = ("images_per_second", "memory_gb")
        found = [{k: v for k, v in json.loads(line).items() if k not in timing} for line in text.splitlines()]
        lines.append([line for line in found if "loss" in line])
    assert lines[0] == lines[1]


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)  # type: ignore[arg-type]
    elif isinstance(a, dict):
        assert a.keys() == b.keys()  # type: ignore[attr-defined]
        for key in a:
            assert_same(a[key], b[key])  # type: ignore[index]
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):  # type: ignore[call-overload]
            assert_same(one, other)
    else:
        assert a == b


class DieAt:
    """Ends the process at the n-th call by which something changes on the disk."""

    CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")

    def __init__(self, number: int) -> None:
        self.left = number
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            self.count()
            flush(descriptor)

        os.fsync = fsync
        sys.addaudithook(lambda event, _: self.count() if event in self.CALLS else None)

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(9)


def state(step: int) -> tuple[dict[str, torch.Tensor], dict[str, object], dict[str, object]]:
    return {"a": torch.full((50,), float(step))}, {"step": step, "moments": torch.full((9,), -float(step))}, {}


def kill_saves(folder: Path) -> None:
    def save() -> None:
        path = checkpoint.save(folder, 3, *state(3))
        checkpoint.prune(folder, 2)
        checkpoint.keep_best(path, "loss", 1.0)

    number, ended = 0, False
    while not ended:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        for step in (1, 2):
            checkpoint.keep_best(checkpoint.save(folder, step, *state(step)), "loss", 2.0)

        def victim(number: int = number) -> None:
            DieAt(number)
            save()

        ended = os.waitpid(fork(victim), 0)[1] == 0
        found, warnings = checkpoint.load_newest(folder)
        assert found is not None
        assert found.step in (2, 3)
        assert not warnings, warnings
        assert_same((found.weights, found.trainer), state(found.step)[:2])
        best = [checkpoint.load(path) for path in sorted(folder.glob("best-*"))]
        assert best
        assert all(torch.equal(one.weights["a"], state(one.step)[0]["a"]) for one in best)
        save()
        checkpoint.prune(folder, 2)
        assert sorted(path.name for path in folder.iterdir()) == ["best-00000003", "step-00000002", "step-00000003"]
    print(number - 1)


if __name__ == "__main__":
    kind, folder, *words = sys.argv[1:]
    if kind == "run":
        kill_runs(Path(folder), int(words[0]), int(words[1]), words[2:])
    else:
        kill_saves(Path(folder))
