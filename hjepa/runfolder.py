"""A run's folder: who holds it, and what is written into it while the run goes on."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hjepa.config.sections import Logging
from hjepa.errors import ConfigError, FolderInUseError, StorageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


BAD_IMAGES = "bad_images.jsonl"


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `bad_images.jsonl`, `tensorboard/` and `checkpoints/` of one run, held by one
    process.

    Raises:
        ConfigError: when Weights & Biases is asked for and not installed.
        FolderInUseError: when another process holds it.
        StorageError: when it cannot be written.
    """

    def __init__(self, path: Path, name: str, config: Logging) -> None:
        """Take hold of a folder.

        Args:
            path: of the folder; it is made where it is missing.
            name: of the run.
            config: the section.
        """
        if config.wandb.enabled and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logging.wandb.enabled: wandb is not installed; pip install 'hjepa[wandb]', or set it false"
            )
        self.path = path
        self.name = name
        self.config = config
        self.checkpoints = path / "checkpoints"
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        self._metrics: IO[str] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); set experiment.output_dir") from None
        try:
            # The kernel drops the lock with the process, so a killed run leaves nothing to clean up.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderInUseError(
                f"{path}: another process trains here; choose another experiment.output_dir"
            ) from None

    def write_config(self, text: str) -> None:
        """Write the resolved config."""
        (self.path / "config.yaml").write_text(text)

    def open_metrics(self, step: int) -> list[dict[str, Any]]:
        """Start or continue the record after `step` steps; lines from beyond it, of steps that will be redone, go.

        Returns:
            the lines that stay.
        """
        path = self.path / "metrics.jsonl"
        kept: list[str] = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept))
        self._metrics = path.open("a")
        if self.config.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step or None)
        if self.config.wandb.enabled:
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
        assert self._metrics is not None
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def open_bad_images(self, step: int | None) -> dict[str, str]:
        """Start the list of unreadable files (None), or continue it after `step` steps; later lines go.

        Returns:
            reason by path.
        """
        return self._keep_bad_images(lambda line: step is not None and _step_of(line) <= step)

    def add_bad_images(self, step: int, found: Mapping[str, str]) -> None:
        """Write down files that cannot be read, and why; known after `step` steps."""
        with (self.path / BAD_IMAGES).open("a") as file:
            for path, reason in found.items():
                file.write(json.dumps({"step": step, "file": path, "reason": reason}) + "\n")

    def drop_bad_images(self, mended: Collection[str]) -> None:
        """Take files off the list."""
        self._keep_bad_images(lambda line: json.loads(line)["file"] not in mended)

    def _keep_bad_images(self, keeps: Callable[[str], bool]) -> dict[str, str]:
        path = self.path / BAD_IMAGES
        kept = [line for line in path.read_text().splitlines() if keeps(line)] if path.exists() else []
        if kept:
            path.write_text("".join(f"{line}\n" for line in kept))
        else:
            path.unlink(missing_ok=True)
        return {entry["file"]: entry["reason"] for entry in map(json.loads, kept)}

    def close(self) -> None:
        """Finish the files and let the folder go."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(quiet=True)
        if self._metrics is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            self._metrics.close()
        self._lock.close()


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a kill belongs to no step and goes."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
