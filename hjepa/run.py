"""Everything that a run is made of, built once from its config."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hjepa import checkpoint
from hjepa.build import create_hjepa_from_config, grid_of, run_path
from hjepa.config import Config
from hjepa.config.checks import process_checks
from hjepa.config.switches import idle_settings
from hjepa.console import Console
from hjepa.data.loader import Batches
from hjepa.data.source import links_left_out
from hjepa.data.sources import TITLES, cache, open_training
from hjepa.data.views import Views, center_views, plain_views
from hjepa.device import DeviceKind, has_bfloat16, precision
from hjepa.distributed import gather_objects
from hjepa.errors import ConfigError
from hjepa.evaluate import build_evaluator
from hjepa.evaluation.evaluator import Evaluator
from hjepa.lightning import Fabric
from hjepa.masks import BlockMasks
from hjepa.memory import settle_batch_size
from hjepa.model.hjepa import HJEPA
from hjepa.model.whitening import NUM_PATCHES, whiten_patches
from hjepa.objective import Objective
from hjepa.optim import Schedules, build_optimizers
from hjepa.quarantine import Quarantine
from hjepa.rng import scalar_seed
from hjepa.runfolder import RunFolder
from hjepa.selfcheck import verify_compiler, verify_device
from hjepa.signals import StopSignals
from hjepa.writer import Writer


@dataclass
class Progress:
    """What the loop has to remember besides weights; saved with them.

    Attributes:
        step: optimizer steps done.
        total: optimizer steps of the whole run, fixed once; 0 before that.
        seconds: time that earlier processes of this run have used.
        reserve: time that is kept for the end, where the run has a limit.
        baselines: time that is kept for the first evaluation's baselines beside that.
        update: how far the weights of the encoder's last block moved in a step, relative to their size: the largest
            since the last line of the record (0-d, on the device).
        epoch_loss: sum of the epoch's losses so far, skipped steps left out (0-d, on the device).
        rollbacks: how often the run went back to an earlier checkpoint.
        bad_in_a_row, bad_steps: steps skipped because something was not finite (0-d int64, on the device).
    """

    step: int
    total: int
    seconds: float
    reserve: float
    baselines: float
    update: Tensor
    epoch_loss: Tensor
    bad_in_a_row: Tensor
    bad_steps: Tensor
    rollbacks: int = 0

    @classmethod
    def start(cls, device: torch.device) -> Progress:
        """Nothing done yet."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        update, loss = torch.zeros((), device=device), torch.zeros((), device=device)
        return cls(0, 0, 0.0, 0.0, 0.0, update, loss, zero, zero.clone())

    @classmethod
    def restore(cls, saved: dict[str, Any], device: torch.device) -> Progress:
        """As it was saved: from `vars` of another."""
        values: dict[str, Any] = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}
        return cls(**values)


@dataclass
class Run:
    """What the loop works with."""

    config: Config
    fabric: Fabric
    kind: DeviceKind
    console: Console
    folder: RunFolder | None  # held by the first process
    model: HJEPA
    module: Any  # the model as Fabric wraps it: forward and backward go through it
    optimizers: list[Any]
    objective: Objective
    schedules: Schedules | None  # none until the number of steps is fixed
    batches: Batches
    views: Views
    crops: Views
    evaluator: Evaluator | None
    quarantine: Quarantine
    progress: Progress
    stop: StopSignals = field(default_factory=StopSignals)
    writer: Writer | None = None  # of the first process, while it trains
    started: float = field(default_factory=time.monotonic)
    results: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    automatic: bool = False  # data.batch_size was left to the machine
    moving: bool = False  # between the first weight of a step that moves and the last

    @property
    def seconds(self) -> float:
        """Time that the run has used, earlier processes included."""
        return self.progress.seconds + time.monotonic() - self.started

    def state(self) -> tuple[int, dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """All that the run needs to go on, as `Writer.submit` takes it."""
        assert not self.moving, "half a step is never written"
        progress = vars(self.progress) | {"seconds": self.seconds}
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        trainer = {"optimizers": states, "progress": progress}
        return self.progress.step, self.model.state_dict(), trainer, self.config.model_dump(mode="json")

    def restore(self, saved: checkpoint.Saved) -> None:
        """Go on from a checkpoint; the config's settings hold where it has other ones."""
        self.model.load_state_dict(saved.weights)
        self.progress = Progress.restore(saved.trainer["progress"], self.fabric.device)
        for optimizer, state in zip(self.optimizers, saved.trainer["optimizers"], strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, settings, strict=True):
                group.update(values)


def build(
    config: Config,
    fabric: Fabric,
    kind: DeviceKind,
    console: Console,
    folder: RunFolder | None = None,
    resume: bool = False,
    sample: int | None = None,
    accept: Collection[str] = (),
) -> Run:
    """Model, data and state of a run, from its config and, when resumed, its newest checkpoint.

    Args:
        config: the whole of a run.
        fabric, kind: see `open_fabric`.
        console: where it is told.
        folder: the run's folder, on the first process; None leaves no trace.
        resume: continue from the newest checkpoint in the run's folder.
        sample: decode only so many images of each source that is kept in memory, for a trial of a few steps.
        accept: settings that may differ from those of the run that is resumed, see `checkpoint.changes`.
    """
    started = time.monotonic()
    saved = None
    checkpoints = run_path(config) / "checkpoints"
    if sample is None and checkpoint.find(checkpoints) and not resume:
        raise ConfigError(
            f"{checkpoints.parent}: holds a run already; continue it with --resume, or choose another "
            "experiment.output_dir"
        )
    if resume:
        saved, warnings = checkpoint.load_newest(checkpoints)
        for warning in warnings:
            console.warn(warning)
        if len(set(gather_objects([0 if saved is None else saved.step]))) > 1:
            raise ConfigError(
                f"experiment.output_dir: not all processes find the same checkpoint in {checkpoints}; several machines "
                "need a folder that they share"
            )
    for line in idle_settings(config):
        console.warn(line)

    console.say("Creating model...")
    model = create_hjepa_from_config(config, continued=saved is not None)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.say(f"Model created: HJEPA with {trainable / 1e6:.1f}M parameters")
    arithmetic = precision(kind, config.training.use_amp)
    console.say(f"Device: {fabric.device} ({fabric.world_size} process(es)), {arithmetic}")
    if kind.name == "cpu" and config.training.use_amp is True and not has_bfloat16("cpu"):
        console.warn("training.use_amp: this processor is slower in bfloat16 than in float32; set it to auto")
    automatic = config.data.batch_size == "auto"
    if automatic:
        config = settle_batch_size(config, model, fabric, saved.config if saved else None)
        wrong = process_checks(config.data, config.training, fabric.world_size)
        if wrong:
            raise ConfigError(wrong)
        parts = config.training.accumulation_steps
        console.say(f"Batch: {config.data.batch_size} images a step, computed in {parts} part(s)")
    if kind.is_verified:
        verify_device(config, model, fabric.device)
    if config.training.use_compile:
        verify_compiler(fabric.device)
        model.compile_blocks()
    changed = checkpoint.changes(saved.config, config.model_dump(mode="json"), accept) if saved is not None else []
    seed, grid = config.experiment.seed, grid_of(config)

    console.say("Loading datasets...")
    # One process at a time: the first may have to download, the others then find it done.
    with fabric.rank_zero_first():
        sources = open_training(config.data, seed)
    for source in sources:
        console.say(f"{TITLES[source.name]}: {len(source)} images")
        if source.left_out:
            console.warn(links_left_out(source))
    quarantine = Quarantine(folder, console, None if saved is None else saved.step)
    quarantine.watch(sources)
    bar = console.bar("Decoding", 1)
    try:
        sources = cache(sources, config.data.cache_gb, lambda done, total: bar.update(done, total=total), sample)
    finally:
        quarantine.write(0)
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

    if config.model.whiten_patches and saved is None:
        whiten_patches(model, _samples(batches, config), scalar_seed(seed, "patch filters", 0))
    multiplied_in = torch.bfloat16 if has_bfloat16(kind.name) else torch.float32
    optimizers = build_optimizers(config.training, model, multiplied_in)
    module, *wrapped = fabric.setup(model, *optimizers)
    evaluator = None
    if config.evaluation.eval_frequency and fabric.is_global_zero:
        found = build_evaluator(config, fabric.device)
        if isinstance(found, str) and config.checkpoint.needs_labels:
            raise ConfigError(f"checkpoint.metric: {config.checkpoint.metric} cannot be measured: {found}")
        if isinstance(found, str):
            console.say(found)
        else:
            evaluator = found
            quarantine.watch(evaluator.sources)
    run = Run(
        config,
        fabric,
        kind,
        console,
        folder,
        model,
        module,
        wrapped,
        Objective(config.loss, config.model.num_hierarchies, model.taps),
        None,
        batches,
        Views(config.data.augmentation, config.data.image_size).to(fabric.device),
        Views(config.data.augmentation, config.data.local_size(config.model.shape.patch_size)).to(fabric.device),
        evaluator,
        quarantine,
        Progress.start(fabric.device),
        started=started,
        automatic=automatic,
    )
    if saved is not None:
        run.restore(saved)
        console.say(f"Resuming after step {run.progress.step}")
        if changed:
            go_on_changed(run, saved, changed)
    return run


def go_on_changed(run: Run, saved: checkpoint.Saved, changed: Collection[str]) -> None:
    """Fit the place in the run to settings that it did not have before; schedules follow the new ones from here.

    Raises:
        ConfigError: for a batch that is larger than it was.
    """
    progress, batches = run.progress, run.batches
    run.console.warn(f"goes on under other settings than it had: {', '.join(changed)}")
    if "data.batch_size" in changed:
        before = saved.config["data"]["batch_size"]
        if before < batches.batch_size:
            # Steps would be numbered down, and a checkpoint's name is its step.
            raise ConfigError(f"data.batch_size: a run can go on with a smaller batch than its {before}, no larger one")
        epoch, within = divmod(progress.step, batches.mixture.epoch_size // before)
        progress.step = epoch * batches.steps_per_epoch + within * before // batches.batch_size
        progress.epoch_loss.zero_()
        run.console.warn(f"steps of {batches.batch_size} images: the place in the run is called step {progress.step}")
    if {"data.batch_size", "training.epochs"} & set(changed):
        progress.total = 0  # to be planned anew


def _samples(batches: Batches, config: Config) -> Tensor:
    """Images from the run's first positions, `NUM_PATCHES` patches of them at most: `[n, 3, S, S]` normalised."""
    per_epoch = batches.steps_per_epoch * batches.batch_size
    wanted = min(max(1, NUM_PATCHES // grid_of(config).size), per_epoch)
    plain = plain_views(config.data.augmentation, config.data.image_size)
    source, index = batches.locate(np.arange(wanted, dtype=np.int64))
    squares = []
    for s in np.unique(source):
        mine = index[source == s]
        read = batches.sources[s].read(mine)
        squares.append(plain(torch.from_numpy(read.images), center_views(read.true_sizes)))
    return torch.cat(squares)
