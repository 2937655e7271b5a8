"""A run from its config to its last checkpoint; `fit` is the loop, and reads as the method does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from hjepa import checkpoint
from hjepa.build import create_hjepa_from_config, grid_of, run_path
from hjepa.config import Config, dump_config
from hjepa.console import Console
from hjepa.data.loader import Batches
from hjepa.data.sources import TITLES, cache, open_training
from hjepa.data.views import Views
from hjepa.device import DeviceKind, choose, peak_memory, precision, process_layout
from hjepa.errors import ConfigError, NonFiniteError
from hjepa.evaluate import build_evaluator, probe, show_results
from hjepa.evaluation.evaluator import Evaluator
from hjepa.masks import BlockMasks
from hjepa.model.hjepa import HJEPA, Output
from hjepa.model.pyramid import taps_of_level
from hjepa.monitor import rankme, relative_std
from hjepa.objective import Losses, Objective
from hjepa.optim import Schedules, build_optimizer, clip_gradients, skip_step_if
from hjepa.rng import scalar_seed
from hjepa.runfolder import RunFolder


@dataclass
class Progress:
    """What the loop has to remember besides weights; saved with them.

    Attributes:
        step: optimizer steps done.
        epoch_loss: sum of the epoch's losses so far, skipped steps left out (0-d, on the device).
        bad_in_a_row, bad_steps: steps skipped because something was not finite (0-d int64, on the device).
    """

    step: int
    epoch_loss: Tensor
    bad_in_a_row: Tensor
    bad_steps: Tensor

    @classmethod
    def start(cls, device: torch.device) -> Progress:
        """Nothing done yet."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls(0, torch.zeros((), device=device), zero, zero.clone())


@dataclass
class Run:
    """Everything that a run is made of, built once from its config."""

    config: Config
    fabric: Fabric
    kind: DeviceKind
    console: Console
    folder: RunFolder | None  # held by the first process
    model: HJEPA
    module: Any  # the model as Fabric wraps it: forward and backward go through it
    optimizer: Any
    objective: Objective
    schedules: Schedules
    batches: Batches
    views: Views
    evaluator: Evaluator | None
    progress: Progress
    results: dict[str, float] = field(default_factory=dict)


def train(config: Config, resume: bool = False) -> dict[str, float]:
    """Pretrain.

    Args:
        config: the whole of a run.
        resume: continue the run in the folder, exactly; start afresh where there is none.

    Returns:
        the last evaluation's figures by name, empty where nothing was evaluated.

    Raises:
        UserError: one of its kinds, for everything that the user can mend.
    """
    kind = choose(config.device)
    local, nodes = process_layout()
    fabric = Fabric(
        accelerator=kind.accelerator,
        devices=local,
        num_nodes=nodes,
        strategy="ddp" if local * nodes > 1 else "auto",
        precision=precision(kind, config.training.use_amp),
    )
    fabric.launch()
    with Console(enabled=fabric.is_global_zero) as console:
        folder = None
        if fabric.is_global_zero:
            folder = RunFolder(run_path(config), config.logging.use_tensorboard)
        try:
            run = build(config, fabric, kind, console, folder, resume)
            fit(run)
            show_results(console, run.results, run_path(config))
        finally:
            if folder is not None:
                folder.close()
    return run.results


def build(
    config: Config, fabric: Fabric, kind: DeviceKind, console: Console, folder: RunFolder | None, resume: bool
) -> Run:
    """Model, data and state of a run, from its config and, when resumed, its newest checkpoint."""
    saved = None
    checkpoints = run_path(config) / "checkpoints"
    if checkpoint.find(checkpoints) and not resume:
        raise ConfigError(
            f"{checkpoints.parent}: holds a run already; continue it with --resume, or choose another "
            "experiment.output_dir"
        )
    if resume:
        saved, warnings = checkpoint.load_newest(checkpoints)
        for warning in warnings:
            console.warn(warning)
        if saved is not None:
            checkpoint.refuse_changes(saved.config, config.model_dump(mode="json"))

    console.say("Creating model...")
    seed, grid = config.experiment.seed, grid_of(config)
    model = create_hjepa_from_config(config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.say(f"Model created: HJEPA with {trainable / 1e6:.1f}M parameters")
    arithmetic = precision(kind, config.training.use_amp)
    console.say(f"Device: {fabric.device} ({fabric.world_size} process(es)), {arithmetic}")

    console.say("Loading datasets...")
    # One process at a time: the first may have to download, the others then find it done.
    with fabric.rank_zero_first():
        sources = open_training(config.data, seed)
    for source in sources:
        console.say(f"{TITLES[source.name]}: {len(source)} images")
    bar = console.bar("Decoding", 1)
    sources = cache(sources, config.data.cache_gb, lambda done, total: bar.update(done, f"of {total}"))
    bar.close()
    batches = Batches(
        config.data,
        sources,
        BlockMasks(config.masking, grid, config.model.num_hierarchies),
        seed,
        config.training.accumulation_steps,
        fabric.global_rank,
        fabric.world_size,
    )

    optimizer = build_optimizer(config.training, model)
    progress = Progress.start(fabric.device)
    if saved is not None:
        model.load_state_dict(saved.weights)
        progress = Progress(
            **{k: v if k == "step" else v.to(fabric.device) for k, v in saved.trainer["progress"].items()}
        )
        console.say(f"Resuming after step {progress.step}")
    module, wrapped = fabric.setup(model, optimizer)
    evaluator = None
    if config.evaluation.eval_frequency and fabric.is_global_zero:
        found = build_evaluator(config, fabric.device)
        if isinstance(found, str):
            console.say(found)
        else:
            evaluator = found
    if saved is not None:
        wrapped.load_state_dict(saved.trainer["optimizer"])
    return Run(
        config,
        fabric,
        kind,
        console,
        folder,
        model,
        module,
        wrapped,
        Objective(config.loss, config.model.num_hierarchies, model.taps),
        Schedules(config.training, config.model.ema, batches.steps_per_epoch),
        batches,
        Views(config.data.augmentation, config.data.image_size).to(fabric.device),
        evaluator,
        progress,
    )


def fit(run: Run) -> None:
    """Take the steps that are left."""
    config, fabric, progress = run.config, run.fabric, run.progress
    per_epoch, seed = run.batches.steps_per_epoch, config.experiment.seed
    last_step = min(run.schedules.total, config.training.max_steps or run.schedules.total)
    if run.folder is not None:
        run.folder.write_config(dump_config(config))
        run.folder.open_metrics(progress.step)
    run.console.say("Starting training..." if progress.step < last_step else "Nothing left to train")
    bar = run.console.bar("Training", last_step, progress.step)
    loader = iter(run.batches.loader(progress.step, last_step, run.kind.pin_memory))
    meter = Meter(config.data.batch_size)
    epoch_start = time.monotonic()

    run.model.train()
    for step in range(progress.step, last_step):
        # Dropped paths are the only draws from torch's own generator: a function of the step as well.
        torch.manual_seed(scalar_seed(seed, f"step/{fabric.global_rank}", step))
        run.schedules.apply(run.optimizer, step)
        for part in range(run.batches.parts):
            batch = next(loader).to(fabric.device)
            with fabric.no_backward_sync(run.module, enabled=part < run.batches.parts - 1):
                output = run.module(batch.render(run.views), batch.masks)
                losses = run.objective(output, scalar_seed(seed, "directions", step * run.batches.parts + part))
                fabric.backward(losses.total / run.batches.parts)
        norm = clip_gradients(run.model, config.training.clip_grad)
        bad = guard(run, losses.total, norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        momentum = run.schedules.momentum(step)
        run.model.update_target(torch.where(bad, 1.0, momentum))  # at 1 the target stays, as the weights did

        progress.step = step + 1
        progress.epoch_loss += torch.where(bad, 0.0, losses.total.detach())
        epoch, meter.steps = step // per_epoch + 1, meter.steps + 1
        end_of_epoch = progress.step % per_epoch == 0
        bar.update(progress.step)
        if progress.step % config.logging.log_frequency == 0 or progress.step == last_step:
            stop_if_broken(run)
            values = describe(run, step, losses, output, norm, momentum) | {"images_per_second": meter.read()}
            bar.update(progress.step, f"loss {values['loss']:.3f}  {values['images_per_second']:.0f} images/s")
            if run.folder is not None:
                run.folder.log(progress.step, epoch, values)
        if end_of_epoch:
            minutes, memory = (time.monotonic() - epoch_start) / 60, peak_memory(fabric.device) / 1e9
            mean = float(progress.epoch_loss) / per_epoch
            run.console.say(
                f"Epoch {epoch}/{config.training.epochs}: loss={mean:.3f} | time={minutes:.1f}min | mem={memory:.1f}GB"
            )
            progress.epoch_loss.zero_()
        if is_due(
            progress.step,
            config.checkpoint.save_frequency * per_epoch,
            config.checkpoint.save_frequency_steps,
        ):
            save(run)
        if end_of_epoch and is_due(epoch, config.evaluation.eval_frequency) and progress.step < last_step:
            evaluate(run, epoch)
        if end_of_epoch:
            epoch_start = time.monotonic()
    stop_if_broken(run)
    bar.close()
    save(run)
    evaluate(run, -(-last_step // per_epoch))


def is_due(count: int, *frequencies: int) -> bool:
    """Whether any of the frequencies (0: never) falls on this count."""
    return any(frequency and count % frequency == 0 for frequency in frequencies)


def guard(run: Run, loss: Tensor, norm: Tensor) -> Tensor:
    """Let no non-finite loss or gradient reach the weights of any process; count without waiting for the device.

    Returns:
        0-d bool on the device: whether this step is skipped, on all processes alike.
    """
    bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
    if run.fabric.world_size > 1:
        bad = run.fabric.all_reduce(bad.float(), reduce_op="sum") > 0
    skip_step_if(run.optimizer.optimizer, bad)
    run.progress.bad_steps += bad
    run.progress.bad_in_a_row = (run.progress.bad_in_a_row + bad) * bad
    return bad


def stop_if_broken(run: Run) -> None:
    """Stop when too many steps in a row were skipped.

    Raises:
        NonFiniteError: naming the last intact checkpoint.
    """
    if int(run.progress.bad_in_a_row) >= run.config.training.max_bad_steps:
        raise NonFiniteError(
            f"the loss or its gradient was not finite in {int(run.progress.bad_in_a_row)} steps in a row, the last "
            f"at step {run.progress.step}; no weight was touched by them. Lower training.lr or set "
            "training.use_amp=false, and continue from the last checkpoint with --resume"
        )


def describe(run: Run, step: int, losses: Losses, output: Output, norm: Tensor, momentum: float) -> dict[str, float]:
    """What is written down of a step; reading it waits for the device, once per line."""
    taps = output.target_taps.detach()
    values = {"loss": float(losses.total.detach())}
    values |= {f"loss/{name}": float(value) for name, value in losses.terms.items()}
    values |= {"lr": run.schedules.lr(step), "momentum": momentum, "grad_norm": float(norm)}
    for level in range(run.model.num_levels):
        of_level = taps[:, :, taps_of_level(taps.shape[2], level)]
        values[f"std/level{level}"] = float(relative_std(of_level))
    values["rankme"] = float(rankme(output.target_tokens.mean(dim=1)))
    values["memory_gb"] = peak_memory(run.fabric.device) / 1e9
    if int(run.progress.bad_steps):
        values["bad_steps"] = int(run.progress.bad_steps)
    return values


class Meter:
    """Images per second since it was last read."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps = 0
        self.since = time.monotonic()

    def read(self) -> float:
        """The rate, and start anew."""
        now = time.monotonic()
        rate = self.steps * self.batch_size / max(now - self.since, 1e-9)
        self.steps, self.since = 0, now
        return rate


def save(run: Run) -> None:
    """Write a checkpoint from the first process; the others wait."""
    if run.folder is not None:
        trainer = {"optimizer": run.optimizer.state_dict(), "progress": vars(run.progress)}
        weights, config = run.model.state_dict(), run.config.model_dump(mode="json")
        checkpoint.save(run.folder.checkpoints, run.progress.step, weights, trainer, config)
        checkpoint.prune(run.folder.checkpoints, run.config.checkpoint.keep_last_k)
    run.fabric.barrier()


def evaluate(run: Run, epoch: int) -> None:
    """Probe the encoders beside raw pixels and an untrained encoder; on the first process, the others wait."""
    if run.evaluator is not None and run.folder is not None:
        run.results = probe(run.evaluator, run.model, run.config)
        run.model.train()
        run.folder.log(run.progress.step, epoch, run.results)
        shown = ", ".join(f"{name}={run.results[f'eval/{name}']:.1f}" for name in ("knn", "knn_pixels", "knn_random"))
        run.console.say(f"Evaluation: {shown}")
    run.fabric.barrier()
