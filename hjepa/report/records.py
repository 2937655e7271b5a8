"""What a run wrote down of itself, read back with forgiveness: whatever is missing is left out, never guessed."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hjepa import checkpoint
from hjepa.config import Config, load_config
from hjepa.diagnosis import Diagnosis
from hjepa.errors import ConfigError, StorageError
from hjepa.runfolder import BAD_IMAGES, ENVIRONMENT, METRICS, Values, read_lines, read_metrics


@dataclass
class Record:
    """One run.

    Attributes:
        path: its folder.
        name: how it is called beside others.
        config: its resolved settings.
        steps: values by step of the lines of training, in order; of a step that was taken twice, the later line.
        evaluations: values by step of the evaluations, likewise, the `eval/` of their names left out.
        environment: what it ran on, one entry per start; empty for a run that did not write it down.
        unreadable: lines of `metrics.jsonl` that are no record, such as one that was cut off.
        bad_images: files that could not be read.
        findings: what stands against it, in words; empty for a healthy one.
        saved: its newest intact checkpoint, or None.
        missing: why there is no checkpoint, in words.
        running: whether a process holds the folder.
    """

    path: Path
    name: str
    config: Config
    steps: dict[int, Values]
    evaluations: dict[int, Values]
    environment: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0
    bad_images: int = 0
    findings: list[str] = field(default_factory=list)
    saved: checkpoint.Saved | None = None
    missing: str = ""
    running: bool = False

    @property
    def last_step(self) -> int:
        """Steps done, as far as is known."""
        return max([0, *self.steps, *self.evaluations, self.saved.step if self.saved else 0])

    @property
    def planned(self) -> int | None:
        """Steps of the whole run, or None before a checkpoint says so."""
        if self.saved is None:
            return None
        total = int(self.saved.trainer["progress"]["total"])
        return min(total, self.config.training.max_steps or total)

    @property
    def seconds(self) -> float | None:
        """Time up to the newest checkpoint, or None before there is one."""
        return None if self.saved is None else float(self.saved.trainer["progress"]["seconds"])

    @property
    def probed(self) -> Values:
        """The newest evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    def series(self, name: str) -> list[tuple[int, float | None]]:
        """A figure of training by step; None where it was not finite."""
        return [(step, values[name]) for step, values in self.steps.items() if name in values]

    def names(self) -> list[str]:
        """All figures of training that appear, in the order of their appearance."""
        return list(dict.fromkeys(name for values in self.steps.values() for name in values))


def read_run(path: Path, running: bool | None = None) -> Record:
    """Read a run's folder; nothing in it is changed.

    Args:
        path: the folder.
        running: whether a process trains there; None asks the folder's lock.

    Raises:
        ConfigError: when there is no run, or its config is refused.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: no run here (config.yaml is missing); give the folder of a run")
    config = load_config(path / "config.yaml")
    steps, evaluations, unreadable = read_metrics(path / METRICS)
    record = Record(path, path.resolve().name, config, steps, evaluations, unreadable=unreadable)
    record.environment = [line for line in read_lines(path / ENVIRONMENT) if line is not None]
    record.bad_images = sum(line is not None for line in read_lines(path / BAD_IMAGES))
    record.running = _is_held(path / ".lock") if running is None else running
    diagnosis = Diagnosis(config)
    for step, values in steps.items():
        diagnosis.read(step, values)
    record.findings = [] if diagnosis.verdict == "healthy" else diagnosis.verdict.splitlines()
    try:
        record.saved, _ = checkpoint.load_newest(path / "checkpoints")
        record.missing = "" if record.saved else "no checkpoint has been saved yet"
    except StorageError as error:
        record.missing = str(error).splitlines()[0]
    return record


def _is_held(lock: Path) -> bool:
    """Whether another process has taken hold of a folder."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
