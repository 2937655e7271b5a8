"""Under torchrun, a process that fails ends the others: soon, with a reason, and whatever they were waiting for.

The processes do not hear SIGTERM, which is all that torchrun itself would do in the first thirty seconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hjepa import checkpoint
from hjepa.config.sections import Logging
from hjepa.runfolder import RunFolder

WORKER = Path(__file__).parent / "deaf_worker.py"
LIMIT = 20.0
# Of a process that has said its last word: an interpreter that shuts down hears the signal again.
LEAVING = -signal.SIGTERM

pytestmark = pytest.mark.slow


def launch(out: Path, *words: str, full: str = "full=never") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = (*words, "evaluation.eval_frequency=0", f"experiment.output_dir={out / 'run'}")
    return subprocess.Popen(
        [*command, str(WORKER), str(out), full, "train", *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], since: float) -> tuple[list[str], dict[int, int]]:
    """What the processes said, and the exit code of each as torchrun saw it."""
    _, said = process.communicate(timeout=120)
    assert time.monotonic() - since < LIMIT
    assert process.returncode != 0
    codes = dict(re.findall(r"rank +: (\d) \(local_rank.*\n +exitcode +: (-?\d+)", said))
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return lines, {int(rank): int(code) for rank, code in codes.items()}


def started(out: Path, process: subprocess.Popen[str]) -> float:
    """When both processes had loaded all that they need."""
    wait_for(lambda: all((out / f"rank{rank}.pid").exists() for rank in (0, 1)), process)
    return time.monotonic()


def gone(out: Path) -> bool:
    """Whether no process is left."""
    for rank in (0, 1):
        try:
            os.kill(int((out / f"rank{rank}.pid").read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def test_a_first_process_that_may_not_start_ends_the_others(tmp_path: Path, small: tuple[str, ...]) -> None:
    holder = RunFolder(tmp_path / "run", "holder", Logging(use_tensorboard=False))
    process = launch(tmp_path, *small)
    lines, codes = ended(process, started(tmp_path, process))
    holder.close()
    assert codes == {0: 75, 1: 75}
    assert "another process trains here" in lines[0]
    assert lines[1].startswith("error: process 1: process 0 failed: ")
    assert gone(tmp_path)


def test_a_first_process_that_cannot_save_ends_the_others(tmp_path: Path, small: tuple[str, ...]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".step-00000002.tmp").write_text("in the way")
    process = launch(tmp_path, *small, "checkpoint.save_frequency_steps=2")
    lines, codes = ended(process, started(tmp_path, process))
    assert codes[0] == 5
    assert codes[1] in (5, LEAVING)
    assert "could not be written" in lines[0]
    assert "checkpoint with --resume" in lines[1]
    assert gone(tmp_path)


def test_a_process_without_memory_ends_the_others(tmp_path: Path, small: tuple[str, ...]) -> None:
    process = launch(tmp_path, *small, "checkpoint.save_frequency_steps=1", full="full=3")
    lines, codes = ended(process, started(tmp_path, process))
    assert codes[1] == 6
    assert codes[0] in (6, LEAVING)
    assert any("2 fit: continue with --resume training.accumulation_steps=2" in line for line in lines)
    assert any(line.startswith("error: process 0: process 1 failed: memory: 4 image(s)") for line in lines)
    saved, warnings = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.step == 3
    assert not warnings
    assert gone(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others(tmp_path: Path, small: tuple[str, ...], rank: int) -> None:
    process = launch(tmp_path, *small, "training.epochs=100000", "checkpoint.save_frequency_steps=2")
    record = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: record.exists() and len(record.read_text().splitlines()) > 4, process)
    since = time.monotonic()
    os.kill(int((tmp_path / f"rank{rank}.pid").read_text()), signal.SIGKILL)
    lines, codes = ended(process, since)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] in (1, LEAVING)
    assert lines == [
        f"error: process {1 - rank}: another process is gone; the run goes on from its last checkpoint with --resume"
    ]
    assert gone(tmp_path)
    assert json.loads(record.read_text().splitlines()[-1])["step"] > 4
    saved, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
