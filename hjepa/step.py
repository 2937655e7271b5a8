"""One optimizer step: what the method does with a batch, and what is written down of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hjepa.data.loader import Batch
from hjepa.device import is_out_of_memory, peak_memory
from hjepa.distributed import any_of
from hjepa.errors import MemoryFullError, first_line
from hjepa.memory import settings_that_fit
from hjepa.model.hjepa import Output
from hjepa.model.pyramid import taps_of_level
from hjepa.monitor import drift, explained, rankme, relative_std
from hjepa.objective import Losses
from hjepa.optim import Schedules, clip_gradients, skip_step_if
from hjepa.rng import scalar_seed
from hjepa.run import Run


class Taken(NamedTuple):
    """What a step leaves for the record: of its last part, where it was computed in several.

    Attributes:
        losses: the objective's.
        output: the model's.
        norm: of the gradient before clipping (0-d, on the device).
        momentum: of the target encoder.
        skipped: whether nothing moved, because something was not finite (0-d bool, on the device).
        asked: whether any process was asked to stop (0-d bool, on the device).
    """

    losses: Losses
    output: Output
    norm: Tensor
    momentum: float
    skipped: Tensor
    asked: Tensor


def take_step(run: Run, schedules: Schedules, step: int, batches: Iterator[Batch]) -> Taken:
    """Move the encoder by one batch; nothing here waits for the device.

    Args:
        run: what is moved.
        schedules: the optimizer's settings as functions of the step.
        step: its number in the run, from 0.
        batches: the step's parts come next.

    Raises:
        MemoryFullError: when the device has no memory for it, saying what fits. The state in memory is that before
            the step, or else `run.moving` and never written.
    """
    try:
        return _take_step(run, schedules, step, batches)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Out here nothing holds the error any more, nor what the step held.
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    images = run.batches.batch_size // (run.batches.parts * run.fabric.world_size)
    remedy = settings_that_fit(run.config, run.model, run.fabric, run.automatic)
    raise MemoryFullError(
        f"memory: {images} image(s) at a time do not fit on {run.fabric.device} in step {step + 1} ({reason}); "
        f"nothing of it is kept; {remedy}"
    )


def _take_step(run: Run, schedules: Schedules, step: int, batches: Iterator[Batch]) -> Taken:
    fabric, parts, seed = run.fabric, run.batches.parts, run.config.experiment.seed
    # Dropped paths are the only draws from torch's own generator: a function of the step as well.
    torch.manual_seed(scalar_seed(seed, f"step/{fabric.global_rank}", step))
    schedules.apply(run.optimizers, step)
    for part in range(parts):
        batch = next(batches).to(fabric.device)
        with fabric.no_backward_sync(run.module, enabled=part < parts - 1):
            output = run.module(batch.render(run.views), batch.masks, batch.render_crops(run.crops))
            losses = run.objective(output, scalar_seed(seed, "directions", step * parts + part))
            fabric.backward(losses.total / parts)
        if part < parts - 1:
            del batch, output, losses  # or they are held through the next part
    norm = clip_gradients(run.model, run.config.training.clip_grad)
    skipped, asked = guard(run, losses.total, norm)
    watched = [p for p in run.model.context_encoder.backbone.last_block.parameters() if p.ndim == 2]
    before = [p.detach().clone() for p in watched]
    run.moving = True
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    momentum = schedules.momentum(step)
    run.model.update_target(torch.where(skipped, 1.0, momentum))  # at 1 the target stays, as the weights did
    run.moving = False
    with torch.no_grad():
        run.progress.update = torch.maximum(run.progress.update, drift(watched, before))
    return Taken(losses, output, norm, momentum, skipped, asked)


def guard(run: Run, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Let no non-finite loss or gradient reach the weights of any process; count without waiting for the device.

    Returns:
        two 0-d bool on the device, the same on all processes: whether this step is skipped; whether any process was
        asked to stop.
    """
    bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
    asked = torch.full_like(bad, bool(run.stop.received))
    bad, asked = any_of(torch.stack((bad, asked)))
    for optimizer in run.optimizers:
        skip_step_if(optimizer.optimizer, bad)
    run.progress.bad_steps += bad
    run.progress.bad_in_a_row = (run.progress.bad_in_a_row + bad) * bad
    return bad, asked


def describe(run: Run, schedules: Schedules, step: int, taken: Taken) -> dict[str, float]:
    """What is written down of a step; reading it waits for the device, once per line."""
    losses, output = taken.losses, taken.output
    taps = output.target_taps.detach()
    values = {"loss": float(losses.total.detach())}
    values |= {f"loss/{name}": float(value) for name, value in losses.terms.items()}
    values |= {"lr": schedules.lr(step), "grad_norm": float(taken.norm), "update": float(run.progress.update)}
    if run.model.slow_encoder is not None:
        values["momentum"] = taken.momentum
    if run.model.target_encoder is not None:
        with torch.no_grad():
            values["drift"] = float(
                drift(run.model.target_encoder.parameters(), run.model.context_encoder.parameters())
            )
    for level in range(run.model.num_levels):
        of_level = taps[:, :, taps_of_level(taps.shape[2], level)]
        values[f"std/level{level}"] = float(relative_std(of_level))
    for level, (prediction, target) in enumerate(zip(output.predictions, output.targets, strict=True)):
        values[f"explained/level{level}"] = float(explained(prediction.detach(), target))
    if output.embeddings is not None:
        # Of the first view: absolute, since both regularisers want it to be 1.
        values["std/embedding"] = float(output.embeddings[0].detach().float().std(dim=0).mean())
    values["rankme"] = float(rankme(output.target_tokens.mean(dim=1)))
    values["memory_gb"] = peak_memory(run.fabric.device) / 1e9
    if run.quarantine.found:
        values["bad_images"] = len(run.quarantine.found)
    if int(run.progress.bad_steps):
        values["bad_steps"] = int(run.progress.bad_steps)
    if run.progress.rollbacks:
        values["rollbacks"] = run.progress.rollbacks
    return values
