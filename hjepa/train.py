"""A run from its config to its last checkpoint; `fit` is the loop, `step.take_step` the method."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hjepa.build import run_path
from hjepa.config import Config, as_config, dump_config
from hjepa.console import Console
from hjepa.data.workers import Loader, watched
from hjepa.device import forget_peak, is_out_of_memory, peak_memory
from hjepa.diagnosis import Diagnosis, Spikes
from hjepa.distributed import ending_together
from hjepa.environment import environment
from hjepa.errors import DivergedError, MemoryFullError
from hjepa.evaluate import probe, show_results, worth_in_words
from hjepa.fabric import open_fabric
from hjepa.facade import make_callable
from hjepa.measure import cut_to, measure_run, restored
from hjepa.optim import Schedules
from hjepa.recovery import keep_if_best, note_skipped, require_room, roll_back, save, stop_if_broken, stop_if_gone
from hjepa.report import write_after_run
from hjepa.report.sheets import sheets_of_run
from hjepa.run import Run, build
from hjepa.runfolder import BAD_IMAGES, ENVIRONMENT, RunFolder
from hjepa.signals import LateReader
from hjepa.step import describe, take_step
from hjepa.writer import Writer


def train(
    config: Config | Mapping[str, Any] | str | Path, resume: bool = False, accept: Collection[str] = ()
) -> dict[str, float]:
    """Pretrain; also `hjepa.train`.

    Args:
        config: the whole of a run, or its sections as plain data, or its file.
        resume: continue the run in the folder, exactly; start afresh where there is none.
        accept: settings that may differ from those of the run that is continued, by name.

    Returns:
        the last evaluation's figures by name, empty where nothing was evaluated.

    Raises:
        UserError: one of its kinds, for everything that the user can mend.
    """
    config = as_config(config)
    fabric, kind = open_fabric(config)
    with ending_together(), Console(enabled=fabric.is_global_zero) as console:
        folder, run = None, None
        if fabric.is_global_zero:
            folder = RunFolder(run_path(config), config.experiment.name, config.logging, console.warn)
        try:
            run = build(config, fabric, kind, console, folder, resume, accept=accept)
            with watched():
                plan(run)
                fit(run)
            console.say(f"Verdict: {run.verdict}")
            if run.quarantine.found:
                console.warn(
                    f"{len(run.quarantine.found)} image file(s) could not be read: {run_path(config) / BAD_IMAGES}"
                )
            if folder is not None and config.logging.use_report:
                console.status(now="writing the report")
                write_after_run(folder.path, console)
            show_results(console, run.results, run_path(config))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryFullError(
                f"memory: out of it beside the steps ({error}); continue with --resume and a smaller data.cache_gb, "
                "evaluation.max_train or evaluation.batch_size, or start another run with a smaller model"
            ) from error
        finally:
            if run is not None:
                run.quarantine.write(run.progress.step)
            if folder is not None:
                folder.close()
    return run.results


def plan(run: Run) -> Schedules:
    """Fix the number of steps, once in the life of a run, and with it the schedules.

    Without `training.max_time` it is that of the epochs. With it, a few steps, an evaluation and a save are timed on
    this machine, and where the epochs would take longer, there are as many steps as fit.
    """
    training, per_epoch = run.config.training, run.batches.steps_per_epoch
    wanted = (training.epochs or 0) * per_epoch
    total = run.progress.total or wanted
    if not run.progress.total and training.seconds is not None:
        with restored(run):
            measured = measure_run(run)
        fitting = measured.steps_within(training.seconds - run.seconds, run)
        # The first process's clock decides for all.
        fitting, run.progress.reserve, run.progress.baselines = run.fabric.broadcast(
            (fitting, measured.seconds_at_end, measured.seconds_of_baselines)
        )
        total = cut_to(training, run.progress.step + fitting, per_epoch)
        end = measured.seconds_of(total - run.progress.step, run)
        run.console.say(
            f"Planned: {total} steps ({total / per_epoch:.1f} epochs) at {measured.seconds_per_step:.3g} s, "
            f"ends about {_clock(end)}, within {training.max_time}"
        )
        if wanted and total == wanted and end < 0.8 * (training.seconds - run.seconds):
            run.console.say(f"The time would allow {fitting / per_epoch:.0f} epochs; training.epochs=null takes them")
        elif wanted and total < wanted:
            hours = measured.seconds_of(wanted, run) / 3600
            run.console.say(f"All of training.epochs={training.epochs} would take {hours:.2g}h")
        if end > training.seconds - run.seconds:
            run.console.warn(
                f"training.max_time={training.max_time} is less than a step, an evaluation and a save take; the run "
                "will end later"
            )
    run.progress.total = total
    run.schedules = Schedules(training, run.config.model.ema, per_epoch, total)
    return run.schedules


def fit(run: Run) -> None:
    """Take the steps that are left.

    Raises:
        DivergedError: see `training.on_divergence`.
        StoppedError: when a signal asked for it, all saved.
        StorageError: when a checkpoint could not be written, as soon as that is known.
    """
    assert run.schedules is not None, "plan comes first"
    if run.folder is not None:
        run.folder.write_config(dump_config(run.config))
        started = {
            "after step": run.progress.step,
            "processes": run.fabric.world_size,
            **environment(run.fabric.device),
        }
        run.folder.note(ENVIRONMENT, started)
        run.writer = Writer(run.folder.checkpoints, run.config.checkpoint.keep_last_k)
        require_room(run)
    try:
        with run.stop:
            while True:
                try:
                    take_steps(run, run.schedules)
                    break
                except DivergedError as error:
                    roll_back(run, error)
            evaluate(run, -(-run.progress.step // run.batches.steps_per_epoch))
    except MemoryFullError:
        if not run.moving:
            with suppress(RuntimeError, MemoryError):  # there may be none for a copy either
                save(run)
        raise
    finally:
        if run.writer is not None:
            run.writer.close()


def take_steps(run: Run, schedules: Schedules) -> None:
    """Take steps to the end of the run; the last one is saved as it is evaluated."""
    config, fabric, progress = run.config, run.fabric, run.progress
    per_epoch = run.batches.steps_per_epoch
    last_step = min(schedules.total, config.training.max_steps or schedules.total)
    last_epoch = -(-schedules.total // per_epoch)
    diagnosis, spikes = Diagnosis(config), Spikes()
    if run.folder is not None:
        for earlier in run.folder.open_metrics(progress.step):
            diagnosis.read(earlier["step"], earlier)
    run.console.say("Starting training..." if progress.step < last_step else "Nothing left to train")
    bar = run.console.bar("Training", last_step, progress.step)
    loader = iter(Loader(run.batches, progress.step, last_step, run.kind.pin_memory))
    meter, late = Meter(run.batches.batch_size), LateReader(fabric.device)
    skipped: list[Tensor] = []
    start, first_step = time.monotonic(), progress.step
    epoch_start = start
    if fabric.device.type != "cpu":
        forget_peak(fabric.device)  # that of trials before the first step

    def seconds_left() -> float:
        pace = (time.monotonic() - start) / (progress.step - first_step)
        return (last_step - progress.step) * pace + progress.reserve

    run.model.train()
    for step in range(progress.step, last_step):
        taken = take_step(run, schedules, step, loader)
        progress.step = step + 1
        progress.epoch_loss += torch.where(taken.skipped, 0.0, taken.losses.total.detach())
        skipped.append(taken.skipped)
        epoch, meter.steps = step // per_epoch + 1, meter.steps + 1
        end_of_epoch = progress.step % per_epoch == 0
        last = progress.step == last_step
        asked = late.read(taken.asked) if fabric.world_size > 1 else bool(run.stop.received)
        if run.writer is not None:
            run.writer.check()
        bar.update(progress.step)
        if progress.step % config.logging.log_frequency == 0 or last or asked:
            note_skipped(run, skipped)
            stop_if_broken(run)
            run.quarantine.exchange(run.batches)
            run.quarantine.write(progress.step)
            values = describe(run, schedules, step, taken) | {"images_per_second": meter.read()}
            progress.update.zero_()
            for finding in diagnosis.read(progress.step, values):
                run.console.warn(finding)
            run.console.status(
                training=f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s, "
                f"epoch {epoch}/{last_epoch}, ends {_clock(seconds_left())}",
                verdict=f"verdict so far: {diagnosis.verdict.splitlines()[0]}",
            )
            if run.folder is not None:
                run.folder.log(progress.step, epoch, values)
            stop_if_gone(run, spikes.read(progress.step, values["loss"]))
            if not last and out_of_time(run, last_step):
                last, last_step = True, progress.step
        mean = 0.0
        if end_of_epoch or last:
            minutes, memory = (time.monotonic() - epoch_start) / 60, peak_memory(fabric.device) / 1e9
            mean = float(progress.epoch_loss) / ((progress.step - 1) % per_epoch + 1)
            line = f"Epoch {epoch}/{last_epoch}: loss={mean:.3f} | time={minutes:.1f}min | mem={memory:.1f}GB"
            if config.training.max_time is not None:
                line += f" | ends {_clock(seconds_left())}"
            run.console.say(line)
        if end_of_epoch:
            progress.epoch_loss.zero_()
        if is_due(
            progress.step,
            config.checkpoint.save_frequency * per_epoch,
            config.checkpoint.save_frequency_steps,
        ):
            save(run)
        if end_of_epoch and config.checkpoint.metric == "loss":
            keep_if_best(run, mean)
        if asked:
            save(run, wait=True)
            raise run.stop.reason()
        if end_of_epoch and is_due(epoch, config.evaluation.eval_frequency) and not last:
            evaluate(run, epoch)
            meter = Meter(run.batches.batch_size)  # an evaluation is no slow step
        if end_of_epoch:
            epoch_start = time.monotonic()
        if last:
            break
        del taken  # what it holds of the model's output is not kept through the next step
    bar.close()
    run.verdict = diagnosis.verdict


def out_of_time(run: Run, last_step: int) -> bool:
    """Whether `training.max_time`, less what the last evaluation and save will take, is used up; says so.

    A run is planned to end before that, so this is for a machine that turned out slower than it was.
    """
    limit = run.config.training.seconds
    if limit is None:
        return False
    paid = run.evaluator is not None and run.evaluator.has_baselines
    reserve = run.progress.reserve + (0 if paid else run.progress.baselines)
    if not run.fabric.broadcast(run.seconds > limit - reserve):
        return False
    run.console.warn(
        f"training.max_time={run.config.training.max_time} is used up after step {run.progress.step} of {last_step}: "
        "this machine was slower than when the run was planned. It is saved; --resume with a larger "
        "training.max_time takes the other steps"
    )
    return True


def _clock(seconds: float) -> str:
    """The time of day in so many seconds."""
    then = datetime.now() + timedelta(seconds=seconds)
    return f"{then:%H:%M:%S}" if seconds < 3600 else f"{then:%a %H:%M}"


def is_due(count: int, *frequencies: int) -> bool:
    """Whether any of the frequencies (0: never) falls on this count."""
    return any(frequency and count % frequency == 0 for frequency in frequencies)


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


def evaluate(run: Run, epoch: int) -> None:
    """Probe the encoders beside raw pixels and an untrained encoder; on the first process, the others wait.

    Raises:
        StoppedError: in the middle, when a signal asks for it; the run is saved before.
    """
    save(run, wait=True)
    if run.evaluator is not None and run.folder is not None:
        run.console.status(now=f"evaluating after step {run.progress.step}")
        with run.stop.at_once():
            run.results = probe(run.evaluator, run.model, run.config)
        run.quarantine.write(run.progress.step)
        run.model.train()
        run.folder.log(run.progress.step, epoch, run.results)
        shown = ", ".join(f"{name}={run.results[f'eval/{name}']:.1f}" for name in ("knn", "knn_pixels", "knn_random"))
        run.console.say(f"Evaluation: {shown}")
        run.console.status(now="", worth=f"{worth_in_words(run.results)}, after step {run.progress.step}")
        if run.config.checkpoint.needs_labels:
            keep_if_best(run, run.results[f"eval/{run.config.checkpoint.metric}"])
    if run.folder is not None and run.config.logging.use_pictures:
        path = run.folder.path
        run.folder.log_pictures(run.progress.step, lambda: sheets_of_run(path))
    run.fabric.barrier()


make_callable(__name__, train)
