"""Saving, finding, verifying and pruning the state of a run.

A checkpoint is a folder `step-00001234` that exists whole or not at all: it is written beside its place under a
temporary name, flushed to the disk, and renamed. Weights lie in a safetensors file and the rest is loaded with
`weights_only`, so nothing in a checkpoint is ever executed. The best one by `checkpoint.metric` is
`best-00001234`, whose files are the same on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hjepa.config.walk import completed, differences, flat
from hjepa.errors import ConfigError, StorageError

SCHEMA = 3
WEIGHTS, TRAINER, MANIFEST, BEST = "model.safetensors", "trainer.pt", "manifest.json", "best.json"

# What may differ between a checkpoint and the run that continues it: nothing here changes a weight.
FREE = (
    "experiment.name", "experiment.output_dir", "training.max_steps", "training.max_time", "training.max_bad_steps",
    "training.on_divergence", "training.use_gradient_checkpointing", "checkpoint.", "evaluation.", "logging.",
    "device", "data.num_workers", "data.pin_memory", "data.cache_gb", "data.download", "data.data_path",
    "data.max_bad_fraction", "data.timeout",
)  # fmt: skip
# So may this, for rounding alone, where no loss compares the images that are computed together.
PARTS = "training.accumulation_steps"

# What may differ where the user says so by name: the run goes on as another one from here, which no rerun gives again.
# Everything else makes a model or data that the saved state does not belong to.
ACCEPTABLE = ("training.", "data.batch_size", "data.augmentation.", "model.ema.")
NEVER = ("training.optimizer",)


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

    Args:
        folder: of checkpoints; it is made where it is missing.
        step: optimizer steps done.
        weights, trainer: a `snapshot` of each.
        config: the run's resolved config, as plain data.

    Raises:
        StorageError: when the disk refuses; checkpoints that were there before are untouched.
    """
    final = path_of(folder, step)
    if final.exists():
        return final

    def fill(temporary: Path) -> None:
        save_file(weights, temporary / WEIGHTS)
        torch.save(trainer, temporary / TRAINER)
        files = {name: _describe(temporary / name) for name in (WEIGHTS, TRAINER)}
        manifest = {"schema": SCHEMA, "step": step, "files": files, "config": config}
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1))

    _write_folder(final, fill)
    return final


def keep_best(path: Path, metric: str, value: float) -> Path:
    """Set a finished checkpoint apart as the best one, and let the one before go.

    Raises:
        StorageError: when the disk refuses; the best one before is untouched.
    """
    final = _best_of(path)

    def fill(temporary: Path) -> None:
        for name in (WEIGHTS, TRAINER, MANIFEST):
            try:
                os.link(path / name, temporary / name)
            except OSError:  # not every file system has links
                shutil.copyfile(path / name, temporary / name)
        (temporary / BEST).write_text(json.dumps({"metric": metric, "value": value}))

    if not final.exists():
        _write_folder(final, fill)
    for older in path.parent.glob("best-*"):
        if older != final:
            _remove(older)
    return final


def best_value(folder: Path, metric: str) -> float | None:
    """The figure of the best checkpoint in a folder; None where there is none by this metric."""
    for path in sorted(folder.glob("best-*"), reverse=True):
        try:
            found = json.loads((path / BEST).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("metric") == metric:
            return float(found["value"])
    return None


def _write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """A folder that exists whole or not at all: filled under another name, flushed to the disk, renamed."""
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        temporary.rename(final)
        _flush(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{final}: could not be written ({error}); earlier checkpoints are intact") from error


def snapshot(state: Any) -> Any:
    """The same nesting of dictionaries, lists and tuples with copies of its tensors: contiguous, on the CPU.

    No two of them share memory, which safetensors refuses.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def _best_of(path: Path) -> Path:
    """Where a checkpoint is set apart as the best one."""
    return path.with_name(path.name.replace("step-", "best-"))


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in find(folder):
        if path > path_of(folder, step):
            _remove(path)


def find(folder: Path) -> list[Path]:
    """All finished checkpoints of a folder, newest first."""
    return sorted((p for p in folder.glob("step-*") if (p / MANIFEST).is_file()), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted saves and removals left behind."""
    for old in find(folder)[keep:]:
        _remove(old)
    for stale in (*folder.glob(".step-*.tmp"), *folder.glob(".best-*.tmp")):
        shutil.rmtree(stale, ignore_errors=True)


def _remove(path: Path) -> None:
    """Whole or not at all, too: what is half removed has another name."""
    doomed = path.with_name(f".{path.name}.tmp")
    with suppress(OSError):
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def load(path: Path) -> Saved:
    """Read and verify one checkpoint, for a run that goes on from it.

    Raises:
        StorageError: when a file is missing, damaged, or of another schema, or the folder was renamed: resuming finds
            the newest one by its name.
    """
    with reading(path):
        manifest = verified(path, (WEIGHTS, TRAINER))
        own = path_of(path.parent, manifest["step"])
        if path not in (own, _best_of(own)):
            raise StorageError(f"{path}: holds step {manifest['step']}; a checkpoint keeps the name it was given")
        weights = load_file(path / WEIGHTS)
        trainer = torch.load(path / TRAINER, map_location="cpu", weights_only=True)
    return Saved(manifest["step"], weights, trainer, manifest["config"])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A damaged file can fail in any way, and all of them mean the same."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"{path}: not readable ({type(error).__name__}: {error})") from error


def verified(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The manifest, once it and these files match their checksums."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    if manifest["schema"] != SCHEMA:
        raise StorageError(f"{path}: written in schema {manifest['schema']}, this version reads {SCHEMA}")
    if manifest.pop("sha256", None) != _seal(manifest):
        raise StorageError(f"{path}: {MANIFEST} does not match its own checksum")
    # Named by the caller: a manifest cannot name a file elsewhere, nor leave one unverified.
    for name in names:
        if _describe(path / name) != manifest["files"][name]:
            raise StorageError(f"{path}: {name} does not match its checksum")
    return manifest


def load_newest(folder: Path, before: int | None = None) -> tuple[Saved | None, list[str]]:
    """The newest intact checkpoint, and a warning for each newer one that was passed over.

    Args:
        folder: of checkpoints.
        before: look only at those of at most so many steps.

    Raises:
        StorageError: when there are checkpoints and none is intact: a run is never restarted from zero in silence.
    """
    warnings: list[str] = []
    # Also those without a manifest, which `find` does not see: they were whole once.
    there = sorted(folder.glob("step-*"), reverse=True)
    candidates = [path for path in there if before is None or path <= path_of(folder, before)]
    for path in candidates:
        try:
            return load(path), warnings
        except StorageError as error:
            warnings.append(f"{error}; trying the one before it")
    if candidates:
        raise StorageError(f"{folder}: no intact checkpoint\n" + "\n".join(warnings))
    return None, warnings


def changes(saved: dict[str, Any], wanted: dict[str, Any], accepted: Collection[str] = ()) -> list[str]:
    """Settings under which a run goes on that are not those it had, all of them accepted by name.

    Raises:
        ConfigError: listing every difference that was not accepted; when what was accepted is no setting, or one
            that cannot change.
    """
    known = dict(flat(completed(wanted)))
    for key in accepted:
        if key not in known:
            raise ConfigError(f"--accept {key}: there is no such setting")
        if not _can_change(key):
            raise ConfigError(f"--accept {key}: a run cannot be continued under another one")
    free = FREE if completed(saved)["loss"]["type"] in ("combined", "sigreg") else (*FREE, PARTS)
    changed = differences(saved, wanted)
    differing = [key for key in changed if not key.startswith(free) and not key.endswith(".path")]
    refused = []
    for key in differing:
        if key not in accepted:
            old, new = changed[key]
            advice = f"; --accept {key} goes on with it" if _can_change(key) else ""
            refused.append(f"{key}: the run has {old!r}, the config says {new!r}{advice}")
    if refused:
        raise ConfigError(
            "the run cannot be continued under other settings; put these back, or choose another "
            "experiment.output_dir:\n" + "\n".join(refused)
        )
    return differing


def _can_change(key: str) -> bool:
    return key.startswith((*FREE, *ACCEPTABLE)) and not key.startswith(NEVER)


def _seal(manifest: dict[str, Any]) -> str:
    """Checksum of all that a manifest says; against accidents: whoever can write it can write another."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            import fcntl

            # On macOS fsync stops at the drive's own cache. Network shares may refuse the other.
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            except OSError:
                os.fsync(descriptor)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
