"""Saving, finding, verifying and pruning the state of a run.

A checkpoint is a folder `step-00001234` that exists whole or not at all: it is written beside its place under a
temporary name, flushed to the disk, and renamed. Weights lie in a safetensors file and the rest is loaded with
`weights_only`, so nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hjepa.config.walk import flat
from hjepa.errors import ConfigError, StorageError

SCHEMA = 2
WEIGHTS, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"

# What may differ between a checkpoint and the run that continues it: nothing here changes a weight.
FREE = (
    "experiment.name", "experiment.output_dir", "training.max_steps", "training.max_time", "training.max_bad_steps",
    "checkpoint.", "evaluation.", "logging.", "device", "data.num_workers", "data.pin_memory", "data.cache_gb",
    "data.download", "data.data_path", "data.max_bad_fraction", "data.timeout",
)  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back.

    Attributes:
        step: optimizer steps done.
        weights: the model's state.
        trainer: the optimizer's state and the loop's counters.
        config: the run's resolved config, as plain data.
    """

    step: int
    weights: dict[str, Tensor]
    trainer: dict[str, Any]
    config: dict[str, Any]


def save(folder: Path, step: int, weights: dict[str, Tensor], trainer: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write `folder/step-<step>` as a whole; does nothing when it is there already.

    Raises:
        StorageError: when the disk refuses; checkpoints that were there before are untouched.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # Copies: two names for one storage (tied weights) are an error to safetensors.
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
        torch.save(trainer, temporary / TRAINER)
        files = {name: _describe(temporary / name) for name in (WEIGHTS, TRAINER)}
        manifest = {"schema": SCHEMA, "step": step, "files": files, "config": config}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (WEIGHTS, TRAINER, MANIFEST):
            _flush(temporary / name)
        _flush(temporary)
        temporary.rename(final)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{final}: could not be written ({error}); earlier checkpoints are intact") from error
    return final


def find(folder: Path) -> list[Path]:
    """All finished checkpoints of a folder, newest first."""
    return sorted((p for p in folder.glob("step-*") if (p / MANIFEST).is_file()), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted saves left behind."""
    for old in find(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def load(path: Path) -> Saved:
    """Read and verify one checkpoint.

    Raises:
        StorageError: when a file is missing, damaged, or of another schema.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["schema"] != SCHEMA:
            raise StorageError(f"{path}: written in schema {manifest['schema']}, this version reads {SCHEMA}")
        for name, expected in manifest["files"].items():
            if _describe(path / name) != expected:
                raise StorageError(f"{path}: {name} does not match its checksum")
        weights = load_file(path / WEIGHTS)
        trainer = torch.load(path / TRAINER, map_location="cpu", weights_only=True)
    except StorageError:
        raise
    except Exception as error:  # a damaged file can fail in any way, and all of them mean the same
        raise StorageError(f"{path}: not readable ({type(error).__name__}: {error})") from error
    return Saved(manifest["step"], weights, trainer, manifest["config"])


def load_newest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest intact checkpoint, and a warning for each newer one that was passed over.

    Raises:
        StorageError: when there are checkpoints and none is intact: a run is never restarted from zero in silence.
    """
    warnings: list[str] = []
    candidates = find(folder)
    for path in candidates:
        try:
            return load(path), warnings
        except StorageError as error:
            warnings.append(f"{error}; trying the one before it")
    if candidates:
        raise StorageError(f"{folder}: no intact checkpoint\n" + "\n".join(warnings))
    return None, warnings


def refuse_changes(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that would make it another run.

    Raises:
        ConfigError: listing every differing setting.
    """
    before, now = dict(flat(saved)), dict(flat(wanted))
    differing = [
        f"{key}: the run has {before.get(key)!r}, the config says {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE) and not key.endswith(".path")
    ]
    if differing:
        raise ConfigError(
            "the run cannot be continued under other settings; put these back, or choose another "
            "experiment.output_dir:\n" + "\n".join(differing)
        )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            import fcntl

            # On macOS fsync stops at the drive's own cache.
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
