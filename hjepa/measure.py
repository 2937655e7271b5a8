"""What a run costs, from a few of its own steps."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from hjepa import checkpoint
from hjepa.build import create_hjepa_from_config
from hjepa.config import Config
from hjepa.config.sections import Training
from hjepa.device import forget_peak, peak_memory, resident_memory, synchronize
from hjepa.errors import ConfigError, StorageError
from hjepa.optim import Schedules
from hjepa.run import Progress, Run
from hjepa.step import describe, take_step

WARM_STEPS = 2
LEAST_STEPS = 3
# A run that is planned to the last second ends late half of the time.
MARGIN = 0.97


@dataclass(frozen=True)
class Measured:
    """Times in seconds, sizes in bytes.

    Attributes:
        seconds_per_step: one optimizer step with its data.
        seconds_of_line: one line of the record.
        seconds_of_evaluation: one evaluation of the trained encoder.
        seconds_of_baselines: the baselines beside the first.
        seconds_of_save: one checkpoint.
        bytes_of_save: its size on the disk.
        peak_memory: while stepping; see `device.peak_memory`.
        resident: what the process holds between steps.
    """

    seconds_per_step: float
    seconds_of_line: float
    seconds_of_evaluation: float
    seconds_of_baselines: float
    seconds_of_save: float
    bytes_of_save: int
    peak_memory: int
    resident: int

    def seconds_of(self, total: int, run: Run) -> float:
        """Time of a run of `total` steps, from its first step to its last figure."""
        evaluations, saves = occasions(run.config, total, run.batches.steps_per_epoch)
        lines = total // run.config.logging.log_frequency + 1
        seconds = total * self.seconds_per_step + lines * self.seconds_of_line + saves * self.seconds_of_save
        if run.evaluator is not None:
            seconds += evaluations * self.seconds_of_evaluation + self.seconds_of_baselines
        return seconds

    @property
    def seconds_at_end(self) -> float:
        """Time from the last step to the last figure, without baselines."""
        return self.seconds_of_evaluation + self.seconds_of_save

    def steps_within(self, seconds: float, run: Run) -> int:
        """The most steps that end within `seconds`, evaluations and saves included; at least one."""
        low, high = 1, max(2, int(seconds / self.seconds_per_step) + 2)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds_of(middle, run) <= MARGIN * seconds else (low, middle)
        return low


def occasions(config: Config, total: int, per_epoch: int) -> tuple[int, int]:
    """(evaluations, saves) in a run of `total` steps; there is one of each at its end."""

    def times(every: int) -> int:
        return (total - 1) // every if every else 0

    epochs, steps = config.checkpoint.save_frequency * per_epoch, config.checkpoint.save_frequency_steps
    both = times(math.lcm(epochs, steps)) if epochs and steps else 0
    return times(config.evaluation.eval_frequency * per_epoch) + 1, times(epochs) + times(steps) - both + 1


def refuse_long_warmup(training: Training, total: int, per_epoch: int) -> None:
    """Where epochs are left to `max_time`, nobody knew before how many there would be.

    Raises:
        ConfigError: when the warm-up is as long as the run.
    """
    if training.epochs is None and (training.warmup_epochs or 0) * per_epoch >= total:
        raise ConfigError(
            f"training.warmup_epochs: {training.warmup_epochs:g} leaves nothing of the {total / per_epoch:.3g} epochs "
            f"that max_time allows; use {max(0.0, round(0.1 * total / per_epoch, 2)):g} or leave it out"
        )


@contextmanager
def restored(run: Run) -> Iterator[None]:
    """Afterwards the run is as it was: a trial leaves no trace in weights, moments or counters."""
    weights = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
    optimizer = deepcopy(run.optimizer.state_dict())
    progress = Progress.restore(vars(run.progress), run.fabric.device)
    try:
        yield
    finally:
        run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(optimizer)
        run.progress = progress


def measure_run(run: Run, seconds: float = 3.0, place: Path | None = None) -> Measured:
    """Take a few true steps, time an evaluation on a few images and write one checkpoint.

    The steps move the model: see `restored`.

    Args:
        run: its evaluator, if any, is timed too.
        seconds: for how long steps are timed; at least three are.
        place: folder where the trial checkpoint is written; the run's when not given.
    """
    device, per_epoch = run.fabric.device, run.batches.steps_per_epoch
    schedules = Schedules(run.config.training, run.config.model.ema, per_epoch, 1000 * per_epoch)
    if device.type != "cpu":
        forget_peak(device)  # that of the search for a batch that fits
    run.model.train()
    batches = iter(run.batches.loader(0, 10_000, run.kind.pin_memory))
    for step in range(WARM_STEPS):
        if step == WARM_STEPS - 1:
            synchronize(device)
            start = time.monotonic()
        take_step(run, schedules, step, batches)
    synchronize(device)
    # As many on every process: they wait for each other's gradients. What loader workers have made in advance goes
    # first, in a few times the time that is measured.
    one = time.monotonic() - start
    ahead = min(2 * run.config.data.num_workers // run.batches.parts, int(4 * seconds / one))
    ahead, count = run.fabric.broadcast((ahead, max(LEAST_STEPS, min(200, int(seconds / one)))))
    for step in range(WARM_STEPS, WARM_STEPS + ahead):
        take_step(run, schedules, step, batches)
    synchronize(device)
    start = time.monotonic()
    for step in range(WARM_STEPS + ahead, WARM_STEPS + ahead + count):
        taken = take_step(run, schedules, step, batches)
    synchronize(device)
    per_step = (time.monotonic() - start) / count
    start = time.monotonic()
    describe(run, schedules, 0, taken)
    per_line = time.monotonic() - start
    del batches
    peak, resident = peak_memory(device), resident_memory()
    once, baselines = 0.0, 0.0
    if run.evaluator is not None:
        run.model.eval()
        untrained = create_hjepa_from_config(run.config).to(device).eval()
        online = None if run.model.target_encoder is None else lambda images: run.model.embed(images, online=True)
        once, baselines = run.evaluator.timing(run.model.embed, online, untrained.embed, seconds / 4)
        run.model.train()
    saving, size = _time_save(run, place or (run.folder.path if run.folder is not None else None))
    return Measured(per_step, per_line, once, baselines, saving, size, peak, resident)


def _time_save(run: Run, place: Path | None) -> tuple[float, int]:
    """Seconds and bytes of a checkpoint on the disk that the run writes to."""
    if not run.fabric.is_global_zero:
        return 0.0, 0
    try:
        folder = Path(mkdtemp(prefix=".trial-", dir=place))
    except OSError as error:
        raise StorageError(f"{place}: cannot be written ({error.strerror}); set experiment.output_dir") from None
    try:
        trainer = {"optimizer": run.optimizer.state_dict(), "progress": vars(run.progress)}
        start = time.monotonic()
        saved = checkpoint.save(folder, 0, run.model.state_dict(), trainer, run.config.model_dump(mode="json"))
        return time.monotonic() - start, sum(file.stat().st_size for file in saved.iterdir())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
