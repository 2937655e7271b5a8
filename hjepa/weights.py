"""The weights of a run for those who use them: nothing of the loop that made them is needed, nor its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hjepa.checkpoint import MANIFEST, WEIGHTS, reading, verified
from hjepa.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Weights:
    """The part of a checkpoint that outlives its run.

    Attributes:
        path: of the checkpoint's folder.
        step, weights, config: see `Saved`.
        sha256: of the file of weights.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    config: dict[str, Any]
    sha256: str


def load_weights(path: Path) -> Weights:
    """Read and verify the weights of one checkpoint, which may have been copied, renamed, or left without its trainer.

    Raises:
        StorageError: when a file is missing, damaged, or of another schema.
    """
    with reading(path):
        manifest = verified(path, (WEIGHTS,))
        sha256 = manifest["files"][WEIGHTS]["sha256"]
        return Weights(path, manifest["step"], load_file(path / WEIGHTS), manifest["config"], sha256)


def find_weights(path: Path, warn: Callable[[str], None]) -> Weights:
    """The weights of a checkpoint, or of the newest intact one of a run.

    Args:
        path: a checkpoint's folder, a run's, or one that holds checkpoints.
        warn: is told of newer ones that were passed over.

    Raises:
        ConfigError: when there is neither.
        StorageError: when no checkpoint is intact.
    """
    if (path / MANIFEST).is_file():
        return load_weights(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    there = sorted(folder.glob("step-*"), reverse=True) or sorted(folder.glob("best-*"), reverse=True)
    if not there:
        what = "no checkpoint here" if path.is_dir() else "no such folder"
        raise ConfigError(f"{path}: {what}; give the folder of a run, or of a checkpoint in its checkpoints/")
    told: list[str] = []
    for candidate in there:
        try:
            found = load_weights(candidate)
        except StorageError as error:
            told.append(f"{error}; trying the one before it")
        else:
            for text in told:
                warn(text)
            return found
    raise StorageError(f"{folder}: no intact checkpoint\n" + "\n".join(told))
