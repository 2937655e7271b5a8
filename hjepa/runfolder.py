"""A run's folder: who holds it, and what is written into it while the run goes on.

Records are for people: what cannot be written is told once and stops nothing. What a run needs to go on is in its
checkpoints, and those do stop it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hjepa.config.sections import Logging
from hjepa.errors import ConfigError, FolderInUseError, StorageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


METRICS = "metrics.jsonl"
BAD_IMAGES = "bad_images.jsonl"
ENVIRONMENT = "environment.jsonl"

Values = dict[str, float | None]

_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(_locks)])


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `bad_images.jsonl`, `tensorboard/` and `checkpoints/` of one run, held by one
    process.

    Raises:
        ConfigError: when Weights & Biases is asked for and not installed.
        FolderInUseError: when another process holds it.
        StorageError: when it cannot be written.
    """

    def __init__(self, path: Path, name: str, config: Logging, warn: Callable[[str], None] = print) -> None:
        """Take hold of a folder.

        Args:
            path: of the folder; it is made where it is missing.
            name: of the run.
            config: the section.
            warn: is told what could not be recorded.
        """
        if config.wandb.enabled and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logging.wandb.enabled: wandb is not installed; pip install 'hjepa[wandb]', or set it false"
            )
        self.path = path
        self.name = name
        self.config = config
        self.warn = warn
        self.checkpoints = path / "checkpoints"
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        self._metrics: IO[str] | None = None
        self._silent: set[str] = set()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise _refused(path, error) from None
        try:
            # The kernel drops the lock with the process, so a killed run leaves nothing to clean up. Loader processes
            # outlive it by some seconds and must not hold what they inherited.
            _locks.add(self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderInUseError(
                f"{path}: another process trains here; choose another experiment.output_dir"
            ) from None

    def write_config(self, text: str) -> None:
        """Write the resolved config.

        Raises:
            StorageError: when the disk refuses.
        """
        try:
            _replace(self.path / "config.yaml", text)
        except OSError as error:
            raise _refused(self.path, error) from None

    def open_metrics(self, step: int) -> list[dict[str, Any]]:
        """Start or continue the record after `step` steps; lines from beyond it, of steps that will be redone, go.

        Returns:
            the lines that stay.
        """
        path = self.path / METRICS
        kept: list[str] = []
        self.close_records()
        with self._optional("metrics.jsonl"):
            kept = _keep_lines(path, lambda line: _step_of(line) <= step)
            self._metrics = path.open("a")
        with self._optional("TensorBoard"):
            if self.config.use_tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step or None)
        with self._optional("Weights & Biases"):
            if self.config.wandb.enabled and self._wandb is None:
                import wandb

                options = self.config.wandb
                self._wandb = wandb.init(
                    project=options.project,
                    name=self.name,
                    tags=list(options.tags),
                    dir=str(self.path),
                    reinit="create_new",
                )
        return [json.loads(line) for line in kept]

    def log(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line to the record and a point to each curve; what is not finite is null there."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._optional("metrics.jsonl"):
            if self._metrics is not None:
                self._metrics.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
                self._metrics.flush()
        with self._optional("TensorBoard"):
            if self._tensorboard is not None:
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
        with self._optional("Weights & Biases"):
            if self._wandb is not None:
                self._wandb.log(values, step=step)

    def log_pictures(self, step: int, pictures: Callable[[], Mapping[str, NDArray[np.uint8]]]) -> None:
        """Put pictures beside the curves.

        Args:
            step: optimizer steps done.
            pictures: draws them, `[H, W, 3]` RGB by name; what fails there is told once, too.
        """
        with self._optional("pictures"):
            drawn = pictures()
            if self._tensorboard is not None:
                for name, pixels in drawn.items():
                    self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({name: wandb.Image(pixels) for name, pixels in drawn.items()}, step=step)

    def note(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to another record."""
        with self._optional(name), (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        """A record that cannot be written is told once, and tried again."""
        try:
            yield
        except Exception as error:  # a logger may fail in any way
            if what not in self._silent:
                self._silent.add(what)
                self.warn(f"{what} could not be written ({error}); the run goes on without")

    def close_records(self) -> None:
        """Finish the files, so that they can be opened anew."""
        with self._optional("TensorBoard"):
            if self._tensorboard is not None:
                self._tensorboard.close()
        with self._optional("metrics.jsonl"):
            if self._metrics is not None:
                with self._metrics:
                    self._metrics.flush()
                    os.fsync(self._metrics.fileno())
        self._tensorboard = self._metrics = None

    def open_bad_images(self, step: int | None) -> dict[str, str]:
        """Start the list of unreadable files (None), or continue it after `step` steps; later lines go.

        Returns:
            reason by path.
        """
        return self._keep_bad_images(lambda line: step is not None and _step_of(line) <= step)

    def add_bad_images(self, step: int, found: Mapping[str, str]) -> None:
        """Write down files that cannot be read, and why; known after `step` steps."""
        for path, reason in found.items():
            self.note(BAD_IMAGES, {"step": step, "file": path, "reason": reason})

    def drop_bad_images(self, mended: Collection[str]) -> None:
        """Take files off the list."""
        self._keep_bad_images(lambda line: json.loads(line)["file"] not in mended)

    def _keep_bad_images(self, keeps: Callable[[str], bool]) -> dict[str, str]:
        path = self.path / BAD_IMAGES
        kept = _keep_lines(path, keeps)
        if not kept:
            path.unlink(missing_ok=True)
        return {entry["file"]: entry["reason"] for entry in map(json.loads, kept)}

    def close(self) -> None:
        """Finish the files and let the folder go."""
        self.close_records()
        with self._optional("Weights & Biases"):
            if self._wandb is not None:
                self._wandb.finish(quiet=True)
        self._lock.close()


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be written ({error.strerror}); set experiment.output_dir")


def _replace(path: Path, text: str) -> None:
    """Write a file that holds the old text or the new one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _keep_lines(path: Path, keeps: Callable[[str], bool]) -> list[str]:
    """Drop the other lines of a record, if there is one."""
    if not path.exists():
        return []
    kept = [line for line in path.read_text().splitlines() if keeps(line)]
    _replace(path, "".join(f"{line}\n" for line in kept))
    return kept


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a kill belongs to no step and goes."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> tuple[dict[int, Values], dict[int, Values], int]:
    """`metrics.jsonl` of any state, such as one with a line that was cut off.

    Returns:
        values by step of the lines of training; those of the evaluations, the `eval/` of their names left out; how
        many lines are neither. Of a step that was taken twice, the later line counts; what is not finite is None.
    """
    steps: dict[int, Values] = {}
    evaluations: dict[int, Values] = {}
    unreadable = 0
    for line in read_lines(path):
        step = None if line is None else line.pop("step", None)
        if line is None or type(step) is not int:
            unreadable += 1
            continue
        values = {name: _number(value) for name, value in line.items() if name != "epoch"}
        if "loss" in values:
            steps[step] = values
        else:
            evaluations[step] = {name.removeprefix("eval/"): value for name, value in values.items()}
    return dict(sorted(steps.items())), dict(sorted(evaluations.items())), unreadable


def read_lines(path: Path) -> list[dict[str, Any] | None]:
    """A record's lines, none where there is no file; None for one that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: list[dict[str, Any] | None] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        found.append(value if isinstance(value, dict) else None)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None
