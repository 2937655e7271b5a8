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
from typing import NamedTuple

from hjepa import checkpoint
from hjepa.build import run_path
from hjepa.config import Config
from hjepa.config.sections import Training
from hjepa.data.workers import Loader
from hjepa.device import forget_peak, peak_memory, resident_memory, synchronize
from hjepa.errors import ConfigError, StorageError
from hjepa.evaluate import probe_timing
from hjepa.optim import Schedules
from hjepa.report.page import page_of_run
from hjepa.report.pictures import draw
from hjepa.report.records import Record
from hjepa.run import Progress, Run
from hjepa.step import Taken, describe, take_step

LEAST_STEPS = 3
# Steps in which blocks of about every size come, the first of each being slow on a GPU or where it is compiled.
SIZES_OF_BLOCKS = 8
# A run that is planned to the last second ends late half of the time.
MARGIN = 0.97


@dataclass(frozen=True)
class Measured:
    """Times in seconds, sizes in bytes.

    Attributes:
        seconds_per_step: one optimizer step with its data.
        seconds_of_line: one line of the record.
        seconds_of_first: what the first steps take beyond others, once in a process: for compiling, for memory.
        seconds_of_evaluation: one evaluation of the trained encoder.
        seconds_of_baselines: the baselines beside the first.
        seconds_of_save: one checkpoint.
        seconds_of_pictures: those of one evaluation, where they are asked for.
        seconds_of_report: the page at the end, where it is asked for.
        bytes_of_save: its size on the disk.
        peak_memory: while stepping; see `device.peak_memory`.
        resident: what the process holds between steps.
    """

    seconds_per_step: float
    seconds_of_line: float
    seconds_of_first: float
    seconds_of_evaluation: float
    seconds_of_baselines: float
    seconds_of_save: float
    seconds_of_pictures: float
    seconds_of_report: float
    bytes_of_save: int
    peak_memory: int
    resident: int

    def seconds_of(self, total: int, run: Run) -> float:
        """Time of a run of `total` steps, from its first step to its page."""
        evaluations, saves = occasions(run.config, total, run.batches.steps_per_epoch)
        lines = total // run.config.logging.log_frequency + 1
        seconds = total * self.seconds_per_step + lines * self.seconds_of_line + saves * self.seconds_of_save
        if run.evaluator is not None:
            seconds += evaluations * self.seconds_of_evaluation + self.seconds_of_baselines
        return seconds + evaluations * self.seconds_of_pictures + self.seconds_of_report

    @property
    def seconds_at_end(self) -> float:
        """Time from the last step to the page, without baselines."""
        return self.seconds_of_evaluation + self.seconds_of_save + self.seconds_of_pictures + self.seconds_of_report

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


def cut_to(training: Training, fitting: int, per_epoch: int) -> int:
    """Steps of a run in whose `max_time` there is room for `fitting`: those of its epochs where they are fewer.

    Raises:
        ConfigError: when the epochs are left to `max_time` and the warm-up is as long as the run.
    """
    if training.epochs is not None:
        return min(training.epochs * per_epoch, fitting)
    if (training.warmup_epochs or 0) * per_epoch >= fitting:
        epochs = fitting / per_epoch
        raise ConfigError(
            f"training.warmup_epochs: {training.warmup_epochs:g} leaves nothing of the {epochs:.3g} epochs that "
            f"max_time allows; use {round(0.1 * epochs, 2):g} or leave it out"
        )
    return fitting


@contextmanager
def restored(run: Run) -> Iterator[None]:
    """Afterwards the run is as it was: a trial leaves no trace in weights, moments or counters."""
    weights = {name: value.detach().cpu().clone() for name, value in run.model.state_dict().items()}
    states = [deepcopy(optimizer.state_dict()) for optimizer in run.optimizers]
    progress = Progress.restore(vars(run.progress), run.fabric.device)
    try:
        yield
    finally:
        run.model.load_state_dict(weights)
        for optimizer, state in zip(run.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        run.progress = progress


def measure_run(run: Run, seconds: float = 3.0, place: Path | None = None) -> Measured:
    """Take a few true steps, time an evaluation on a few images and write one checkpoint.

    The steps move the model: see `restored`.

    Args:
        run: its evaluator, if any, is timed too.
        seconds: for how long steps are timed; at least three are.
        place: folder where the trial checkpoint is written; the run's when not given.
    """
    device = run.fabric.device
    if device.type != "cpu":
        forget_peak(device)  # that of the search for a batch that fits
    run.model.train()
    steps = time_steps(run, seconds)
    peak, resident = peak_memory(device), resident_memory()
    once, baselines = 0.0, 0.0
    if run.evaluator is not None:
        once, baselines = probe_timing(run.evaluator, run.model, run.config, seconds / 4)
        run.model.train()
    saving, loading, size = _time_save(run, place or (run.folder.path if run.folder is not None else None))
    pictures, page = _time_page(run)
    drawn, written = loading + pictures, loading + pictures + page
    logging, drawing = run.config.logging, run.config.evaluation.eval_frequency > 0
    return Measured(
        steps.usual,
        steps.line,
        steps.first,
        once,
        baselines,
        saving,
        drawn if logging.use_pictures and drawing else 0.0,
        written if logging.use_report else 0.0,
        size,
        peak,
        resident,
    )


class StepTimes(NamedTuple):
    """Seconds of a usual step, of its line in the record, and of the first steps beyond what usual ones take."""

    usual: float
    line: float
    first: float


def time_steps(run: Run, seconds: float) -> StepTimes:
    """Take steps for that long; they move the model, see `restored`."""
    per_epoch = run.batches.steps_per_epoch
    schedules = Schedules(run.config.training, run.config.model.ema, per_epoch, 1000 * per_epoch)
    batches = iter(Loader(run.batches, 0, 10_000, run.kind.pin_memory))

    def timed(first: int, count: int) -> tuple[float, Taken | None]:
        taken = None
        synchronize(run.fabric.device)
        start = time.monotonic()
        for step in range(first, first + count):
            taken = None  # the last one's is not held through this one
            taken = take_step(run, schedules, step, batches)
        synchronize(run.fabric.device)
        return time.monotonic() - start, taken

    first = SIZES_OF_BLOCKS if run.config.training.use_compile else 1  # each is compiled when it comes
    beginning, _ = timed(0, first)
    one, _ = timed(first, 1)
    # As many on every process: they wait for each other's gradients. What loader workers have made in advance goes
    # first, in a few times the time that is measured; on a GPU the first step of each size of blocks is slow, too.
    sizes = 0 if run.fabric.device.type == "cpu" else SIZES_OF_BLOCKS
    ahead = min(max(sizes, 2 * run.config.data.num_workers // run.batches.parts), int(4 * seconds / one))
    ahead = run.fabric.broadcast(ahead)
    if ahead:
        one = timed(first + 1, ahead)[0] / ahead
    count = run.fabric.broadcast(max(LEAST_STEPS, min(200, int(seconds / one))))
    took, taken = timed(first + 1 + ahead, count)
    assert taken is not None
    start = time.monotonic()
    describe(run, schedules, 0, taken)
    line, usual = time.monotonic() - start, took / count
    return StepTimes(usual, line, max(0.0, beginning - first * usual))


def _time_page(run: Run) -> tuple[float, float]:
    """Seconds of the pictures of a page, and of the rest of it; of none where none is asked for."""
    if not run.fabric.is_global_zero or not (run.config.logging.use_report or run.config.logging.use_pictures):
        return 0.0, 0.0
    step, weights, trainer, settings = run.state()
    saved = checkpoint.Saved(step, checkpoint.snapshot(weights), trainer, settings)
    record = Record(run_path(run.config), run.config.experiment.name, run.config, {}, {}, saved=saved)
    start = time.monotonic()
    try:
        pictures = draw(record)
        drawn = time.monotonic()
        page_of_run(record, pictures)
    except Exception:  # of the page itself, too, a failure is a warning and no more
        return 0.0, 0.0
    return drawn - start, time.monotonic() - drawn


def _time_save(run: Run, place: Path | None) -> tuple[float, float, int]:
    """Seconds of writing and of reading a checkpoint on the disk that the run writes to, and its bytes."""
    if not run.fabric.is_global_zero:
        return 0.0, 0.0, 0
    try:
        folder = Path(mkdtemp(prefix=".trial-", dir=place))
    except OSError as error:
        raise StorageError(f"{place}: cannot be written ({error.strerror}); set experiment.output_dir") from None
    try:
        start = time.monotonic()
        step, weights, trainer, config = run.state()
        saved = checkpoint.save(folder, step, checkpoint.snapshot(weights), checkpoint.snapshot(trainer), config)
        written = time.monotonic()
        checkpoint.load(saved)
        read = time.monotonic()
        return written - start, read - written, sum(file.stat().st_size for file in saved.iterdir())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
