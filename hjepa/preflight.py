"""`hjepa check`: what a run will be and cost, found out before a night is spent on it.

The run is built as it would be trained, except that only a few images are decoded, and a few of its true steps are
taken. Nothing is written but one trial checkpoint, which is removed again.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hjepa import checkpoint
from hjepa.build import create_hjepa_from_config, grid_of, run_path
from hjepa.config import Config
from hjepa.config.switches import idle_settings
from hjepa.console import Console
from hjepa.data.files import FileSource
from hjepa.data.mixture import mixture_of
from hjepa.data.source import Source
from hjepa.data.sources import TITLES, CachedSource, open_training
from hjepa.data.workers import watched
from hjepa.device import free_memory, held_memory, is_out_of_memory, precision
from hjepa.errors import DataError, MemoryFullError, StorageError, UserError
from hjepa.fabric import open_fabric
from hjepa.findings import Report, amount_of_memory, amount_of_time, millions
from hjepa.grid import cells
from hjepa.masks import BlockMasks
from hjepa.measure import Measured, cut_to, measure_run, occasions
from hjepa.memory import largest_batch
from hjepa.model.hjepa import HJEPA
from hjepa.run import Run, build

# Of each source, for the trial steps and for the search for unreadable files.
TRIAL_IMAGES = 256
MOST_ROWS = 65_535  # images times views; of more, kernels of CUDA end with an error that names no cause


def check(config: Config, started: float | None = None, all_images: bool = False, seconds: float = 3.0) -> Report:
    """Look at everything that a run needs, and time it.

    Args:
        config: the whole of a run.
        started: `time.monotonic()` when the process began; the time until training starts counts from there.
        all_images: decode every image file in search of unreadable ones, not only a sample.
        seconds: for how long steps are timed.

    Returns:
        the report; what would end the run is an item of it, not an exception.
    """
    started = time.monotonic() if started is None else started
    report = Report()
    report.add("config", f"{config.experiment.name}: every setting is known and goes with the others")
    for line in idle_settings(config):
        report.add("config", line, "warning")
    try:
        describe_model(report, config, create_hjepa_from_config(config))
    except UserError as error:
        report.fail("model", error)
    describe_tokens(report, config)
    turn: AbstractContextManager[Any] = nullcontext()
    try:
        fabric, kind = open_fabric(config)
        turn = fabric.rank_zero_first()  # the first process may have to download
        processes = f", {fabric.world_size} processes" if fabric.world_size > 1 else ""
        report.add("device", f"{fabric.device}{processes}, {precision(kind, config.training.use_amp)}")
    except UserError as error:
        report.fail("device", error)
    searching = time.monotonic()
    try:
        with turn:
            describe_data(report, config, all_images)
    except UserError as error:
        report.fail("data", error)
    searching = time.monotonic() - searching
    _check_folder(report, config)
    if report.exit_code:
        return report

    try:
        run = build(config, fabric, kind, Console(enabled=False), sample=TRIAL_IMAGES)
        if run.config.data.batch_size != config.data.batch_size:
            parts = run.config.training.accumulation_steps
            report.add("batch", f"auto: {run.batches.batch_size} images a step, computed in {parts} part(s)")
        startup = time.monotonic() - started - searching
        with watched():
            measured = measure_run(run, seconds, _existing(run_path(config)))
        describe_costs(report, run, measured, startup)
    except UserError as error:
        report.fail("steps", error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "set data.batch_size=auto, or raise training.accumulation_steps"
        report.fail("memory", MemoryFullError(f"data.batch_size: {config.data.batch_size} does not fit; {remedy}"))
    return report


def describe_model(report: Report, config: Config, model: HJEPA) -> None:
    """Parameters of each part."""

    def count(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    parts = {
        "encoder": count(model.context_encoder),
        "predictor": count(model.predictor),
        "projector": count(model.projector),
        "target_encoder": count(model.slow_encoder),
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.figures |= {f"parameters_{name}": number for name, number in parts.items()}
    report.figures |= {"parameters_trainable": trainable, "parameters_total": count(model)}
    shape = config.model.shape
    report.add(
        "model",
        f"{config.model.encoder_type}, width {shape.embed_dim}, {shape.depth} blocks, {shape.num_heads} heads, "
        f"patches of {shape.patch_size} px",
    )
    shown = ", ".join(f"{name.replace('_', ' ')} {millions(number)}" for name, number in parts.items() if number)
    report.add("parameters", f"{shown}; total {millions(count(model))}, trainable {millions(trainable)}")


def describe_tokens(report: Report, config: Config) -> None:
    """Tokens that the encoder sees and that are predicted at each level, and the blocks they come from."""
    grid = grid_of(config)
    masks = BlockMasks(config.masking, grid, config.model.num_hierarchies)
    count = config.masking.num_masks
    seen = [masks.num_context(block, share) for block in masks.blocks for share in config.masking.context_scale]
    report.figures |= {"tokens_view": grid.size, "tokens_context": _mean(seen)}
    text = f"{grid.height} x {grid.width} = {grid.size} patches a view; context {_range(seen)}"
    if config.loss.predicts:
        for level in range(config.model.num_hierarchies):
            sizes = [count * rows * columns for rows, columns in (cells(h, w, level) for h, w in masks.blocks)]
            report.figures[f"tokens_level{level}"] = _mean(sizes)
            text += f", targets of level {level}: {_range(sizes)}"
    report.add("tokens", text)
    if count:
        blocks = sorted(masks.blocks)
        shown = f"{blocks[0][0]} x {blocks[0][1]}" + (
            f" to {blocks[-1][0]} x {blocks[-1][1]}" if len(blocks) > 1 else ""
        )
        report.add("masks", f"feasible: {count} block(s) a view, {len(blocks)} size(s), {shown} patches")


def describe_data(report: Report, config: Config, all_images: bool) -> None:
    """Images of each source, their shares, and files that cannot be read.

    Raises:
        DataError: when a source cannot be opened.
    """
    sources = open_training(config.data, config.experiment.seed)
    mixture = mixture_of(config.data, sources, config.experiment.seed)
    for source, share in zip(sources, mixture.counts / mixture.epoch_size, strict=True):
        text = f"{TITLES[source.name]}: {len(source)} images, {100 * share:.0f} % of an epoch"
        some = np.unique(np.linspace(0, len(source) - 1, min(64, len(source))).astype(np.int64))
        indices = np.arange(len(source)) if all_images else some
        bad = _unreadable(source, indices)
        looked = "all" if len(indices) == len(source) else str(len(indices))
        if source.left_out:
            report.add("data", f"{len(source.left_out)} link(s) that lead out of the folder were left out", "warning")
        told = f"{text}; of {looked} decoded, {len(bad)} cannot be read: {'; '.join(bad[:5])}"
        if len(bad) / len(source) > config.data.max_bad_fraction:
            report.fail("data", DataError(f"{told}; mend or remove them, or raise data.max_bad_fraction"))
        elif bad:
            report.add("data", f"{told}; others will take their place", "warning")
        else:
            report.add("data", f"{text}; {looked} decoded, none unreadable")
    report.figures["images"] = sum(len(source) for source in sources)


def _unreadable(source: Source, indices: np.ndarray[Any, np.dtype[np.int64]]) -> list[str]:
    """What is wrong with the images that cannot be decoded."""
    wrong = []
    # Together first, which is what several cores are for; one by one only where something is wrong.
    for part in np.array_split(indices, -(-len(indices) // 64)):
        try:
            source.images(part)
        except DataError:
            for index in part if isinstance(source, FileSource) else ():
                try:
                    source.images(np.asarray([index]))
                except DataError as error:
                    wrong.append(str(error))
    return wrong


def describe_costs(report: Report, run: Run, measured: Measured, startup: float) -> None:
    """Time, memory and disk of the whole run."""
    config, per_epoch = run.config, run.batches.steps_per_epoch
    training = config.training
    cached = [source for source in run.batches.sources if isinstance(source, CachedSource)]
    startup += measured.seconds_of_first
    decoding = sum((len(source) - source.decoded) * source.seconds_per_image for source in cached)
    total = (training.epochs or 0) * per_epoch
    if training.seconds is not None:
        fitting = measured.steps_within(training.seconds - startup - decoding, run)
        total = cut_to(training, fitting, per_epoch)
    steps = min(total, training.max_steps or total)
    seconds = startup + decoding + measured.seconds_of(steps, run)
    evaluations, saves = occasions(config, steps, per_epoch)
    report.figures |= {
        "steps": steps,
        "seconds_per_step": measured.seconds_per_step,
        "seconds_of_first": measured.seconds_of_first,
        "seconds_per_epoch": measured.seconds_per_step * per_epoch,
        "seconds_of_evaluation": measured.seconds_of_evaluation,
        "seconds_of_baselines": measured.seconds_of_baselines,
        "seconds_of_save": measured.seconds_of_save,
        "seconds_of_pictures": measured.seconds_of_pictures,
        "seconds_of_report": measured.seconds_of_report,
        "seconds_total": seconds,
    }
    rate = run.batches.batch_size / measured.seconds_per_step
    report.add(
        "step",
        f"{measured.seconds_per_step:.3g} s for {run.batches.batch_size} images, {rate:.0f} images/s; "
        f"{per_epoch} steps an epoch, {amount_of_time(per_epoch * measured.seconds_per_step)}",
    )
    if run.evaluator is not None:
        report.add(
            "evaluation",
            f"{amount_of_time(measured.seconds_of_evaluation)} each, {evaluations} time(s); baselines once, "
            f"{amount_of_time(measured.seconds_of_baselines)}",
        )
    elif config.evaluation.eval_frequency:
        report.add("evaluation", "k-NN skipped: no source has labels and a test part", "warning")
    else:
        report.add("evaluation", "never: evaluation.eval_frequency is 0", "warning")
    _add_memory(report, run, measured, sum((len(s) - s.decoded) * s.nbytes // len(s) for s in cached))
    _add_disk(report, run_path(config), measured, config.checkpoint.keep_last_k, saves)

    before = f"; {amount_of_time(startup + decoding)} of it before steps take their usual time"
    end = datetime.now() + timedelta(seconds=seconds)
    epochs = steps / per_epoch
    report.add(
        "time",
        f"{amount_of_time(seconds)} for {steps} steps ({epochs:.4g} epochs){before}; "
        f"started now it ends {end:%a %H:%M}",
        "warning" if seconds > (training.seconds or 86400) else "ok",
    )
    if training.seconds is not None and training.epochs is not None and total < training.epochs * per_epoch:
        report.add(
            "time",
            f"training.max_time={training.max_time} cuts {training.epochs} epochs to {total / per_epoch:.4g}",
            "warning",
        )


def _add_memory(report: Report, run: Run, measured: Measured, undecoded: int) -> None:
    device, config = run.fabric.device, run.config
    peak = measured.peak_memory
    if device.type == "cpu":
        # The trial decoded a part of what the run will keep, and evaluated a few images.
        beside = 0 if run.evaluator is None else run.evaluator.memory()
        peak = max(peak, measured.resident + beside) + undecoded
    interest = MOST_ROWS // max(config.data.num_views, config.data.multicrop.num_local_crops)
    most = largest_batch(config, run.model, device, interest, run.fabric.autocast)
    free = free_memory(device) + held_memory(device)
    per_part = run.batches.batch_size // (run.batches.parts * run.fabric.world_size)
    report.figures |= {"peak_memory": peak, "largest_batch": most}
    shown = f"{interest} or more" if most >= interest else f"about {most}"
    report.add(
        "memory",
        f"{amount_of_memory(peak)} at its peak of {amount_of_memory(free)}; "
        f"the largest batch that fits in one part: {shown} images",
        "ok" if peak < 0.9 * free and most >= per_part else "warning",
    )


def _add_disk(report: Report, path: Path, measured: Measured, keep: int, saves: int) -> None:
    # One more than is kept, for the time between a save and the pruning after it.
    needed = measured.bytes_of_save * min(keep + 1, saves + 1)
    free = shutil.disk_usage(_existing(path)).free
    each = amount_of_memory(measured.bytes_of_save)
    report.figures |= {"bytes_of_checkpoint": measured.bytes_of_save, "bytes_of_run": needed}
    report.add(
        "disk",
        f"{each} a checkpoint, written in {amount_of_time(measured.seconds_of_save)}, {keep} kept: "
        f"{amount_of_memory(needed)} of {amount_of_memory(free)} free at {path}",
        "ok" if needed < 0.9 * free else "warning",
    )


def _check_folder(report: Report, config: Config) -> None:
    path = run_path(config)
    if not os.access(_existing(path), os.W_OK | os.X_OK):
        report.fail("folder", StorageError(f"{path}: cannot be written; set experiment.output_dir"))
    elif checkpoint.find(path / "checkpoints"):
        report.add("folder", f"{path} holds a run already; train --resume continues it", "warning")
    else:
        report.add("folder", f"{path}")


def _existing(path: Path) -> Path:
    """The nearest folder that exists."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"
