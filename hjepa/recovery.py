"""Nothing is lost: when a run is saved, what it does when it diverges, and what it finds out before it starts."""

from __future__ import annotations

import math
import shutil

import torch
from torch import Tensor

from hjepa import checkpoint
from hjepa.build import run_path
from hjepa.diagnosis import SPIKE
from hjepa.errors import DivergedError, StorageError
from hjepa.optim import Muon
from hjepa.run import Run

# More would be a run that cannot go on.
MAX_ROLLBACKS = 3


def require_room(run: Run) -> None:
    """Find a full disk before the night, not in it.

    Raises:
        StorageError: with what is needed and what is free.
    """
    assert run.folder is not None
    path, config = run.folder.checkpoints, run.config.checkpoint
    each = sum(value.nbytes for value in run.model.state_dict().values())
    for optimizer in run.optimizers:
        moments = 1 if isinstance(optimizer.optimizer, Muon) else 2
        each += moments * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    wanted = config.keep_last_k + 1 + (config.metric is not None)
    needed = each * max(1, wanted - len(checkpoint.find(path)))
    free = shutil.disk_usage(path).free
    if free < needed:
        raise StorageError(
            f"{path}: checkpoints will take {needed / 1e9:.2g} GB and {free / 1e9:.2g} GB are free; make room, or set "
            "experiment.output_dir"
        )


def save(run: Run, wait: bool = False) -> None:
    """Hand a checkpoint to the first process's writer; with `wait`, all processes go on when it lies on the disk."""
    if run.writer is not None:
        run.writer.submit(*run.state())
        if wait:
            run.writer.wait()
    if wait:
        run.fabric.barrier()


def keep_if_best(run: Run, value: float) -> None:
    """Set the state apart where it is better by `checkpoint.metric` than the best so far."""
    metric = run.config.checkpoint.metric
    if run.writer is None or metric is None or not math.isfinite(value):
        return
    best = checkpoint.best_value(run.writer.folder, metric)
    if best is None or (value < best if metric == "loss" else value > best):
        save(run)
        run.writer.wait()
        checkpoint.keep_best(checkpoint.path_of(run.writer.folder, run.progress.step), metric, value)


def note_skipped(run: Run, skipped: list[Tensor]) -> None:
    """Write down which images the steps held that were left out since the last line, and forget the flags."""
    flags = torch.stack(skipped).tolist()
    skipped.clear()
    if run.folder is not None:
        for step, bad in enumerate(flags, start=run.progress.step - len(flags)):
            if bad:
                run.folder.note("bad_steps.jsonl", {"step": step + 1, "samples": run.batches.samples(step)})


def stop_if_broken(run: Run) -> None:
    """Stop when too many steps in a row were skipped.

    Raises:
        DivergedError: saying what to do.
    """
    in_a_row = int(run.progress.bad_in_a_row)
    if in_a_row >= run.config.training.max_bad_steps:
        raise DivergedError(
            f"the loss or its gradient was not finite in {in_a_row} steps in a row, the last "
            f"at step {run.progress.step}; no weight was touched by them. Lower training.lr or set "
            "training.use_amp=false, and continue from the last checkpoint with --resume --accept and its name",
            run.progress.step - in_a_row,
        )


def stop_if_gone(run: Run, good: int | None) -> None:
    """Where the run may roll back, stop when the loss has left where it was; the first process's loss decides.

    Raises:
        DivergedError: saying since when.
    """
    if run.config.training.on_divergence != "rollback":
        return
    good = run.fabric.broadcast(good)
    if good is not None:
        raise DivergedError(
            f"the loss is above {SPIKE:g} times its recent median since step {good}; lower training.lr and continue "
            "with --resume --accept training.lr",
            good,
        )


def roll_back(run: Run, error: DivergedError) -> None:
    """Go on from a checkpoint before the run diverged, with the batches after those it has seen.

    Raises:
        DivergedError: the one given, where that is not wanted, has not helped, or no such checkpoint is left.
    """
    progress, path = run.progress, run_path(run.config) / "checkpoints"
    if run.config.training.on_divergence != "rollback" or progress.rollbacks >= MAX_ROLLBACKS:
        raise error
    if run.writer is not None:
        run.writer.wait()
    run.fabric.barrier()
    saved, warnings = checkpoint.load_newest(path, before=error.good)
    for warning in warnings:
        run.console.warn(warning)
    if saved is None:
        raise error
    run.restore(saved)
    # The batches in between are left out: with them it would diverge again.
    run.progress.step, run.progress.seconds = progress.step, progress.seconds
    run.progress.rollbacks = progress.rollbacks + 1
    run.fabric.barrier()
    if run.folder is not None:
        checkpoint.forget_after(path, saved.step)
        run.folder.note("rollbacks.jsonl", {"from": progress.step, "to": saved.step, "why": str(error)})
    save(run, wait=True)
    run.console.warn(
        f"diverged: {str(error).partition(';')[0]}. Back to the weights of step {saved.step}, going on after step "
        f"{progress.step} (rollback {run.progress.rollbacks} of {MAX_ROLLBACKS})"
    )
