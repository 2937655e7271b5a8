"""What must hold between the sections of a config, found by arithmetic before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hjepa.config.data import Data
from hjepa.config.geometry import feasible_blocks, nearest_masking
from hjepa.config.model import Model
from hjepa.config.sections import Checkpoint, Evaluation, Logging, Loss, Masking, Training
from hjepa.config.types import Conflict


def cross_checks(model: Model, data: Data, masking: Masking, loss: Loss, training: Training) -> Iterator[Conflict]:
    """Settings of different sections that are each fine and do not go together."""
    shape = model.shape
    yield from _grid_checks(model, data, masking)

    weights = loss.hierarchy_weights
    if weights is not None and len(weights) != model.num_hierarchies:
        yield Conflict(
            ("loss.hierarchy_weights", "model.num_hierarchies"),
            f"{len(weights)} weights for {model.num_hierarchies} level(s) (model.num_hierarchies); "
            f"give {model.num_hierarchies}",
        )
    if not loss.predicts and not loss.has_image_level:
        yield Conflict(
            ("loss.hierarchy_weights", "loss.type"),
            f"without prediction, loss.type={loss.type} has nothing to learn from; set loss.type=sigreg",
        )
    if loss.predicts and not masking.num_masks:
        yield Conflict(
            ("masking.num_masks", "loss.hierarchy_weights"),
            "0 hides nothing that could be predicted; use 1 or more, or set loss.hierarchy_weights to zeros",
        )
    crops = data.multicrop.num_local_crops
    if crops and not loss.has_image_level:
        yield Conflict(
            ("data.multicrop.num_local_crops", "loss.type"),
            f"nothing compares views under loss.type={loss.type}; set loss.type=sigreg, or 0 local crops",
        )
    size = data.local_size(shape.patch_size)
    if crops and size > data.image_size:
        yield Conflict(
            ("data.multicrop.local_crop_size", "data.image_size"),
            f"{size} is more than the {data.image_size} of a whole view; use at most that",
        )
    elif crops and size % shape.patch_size:
        yield Conflict(
            ("data.multicrop.local_crop_size", "model.patch_size"),
            f"{size} is not a multiple of the patch size {shape.patch_size}; use {_multiples(size, shape.patch_size)}",
        )
    if not loss.predicts and data.num_views + crops < 2:
        yield Conflict(
            ("data.num_views", "loss.hierarchy_weights"), "without prediction there must be two views to compare; use 2"
        )
    if loss.predict_every > 1 and loss.predicts and data.num_views + crops < 2:
        yield Conflict(
            ("loss.predict_every", "data.num_views"),
            f"{loss.predict_every} leaves images without the second view, which is the target encoder's; use 1, or "
            "data.num_views=2",
        )
    if training.use_gradient_checkpointing == "predictor" and not loss.predicts:
        yield Conflict(
            ("training.use_gradient_checkpointing", "loss.hierarchy_weights"),
            "without prediction there is no predictor to recompute; use encoder",
        )
    if data.batch_size == "auto" and loss.has_image_level and data.global_batch_size == 1:
        yield Conflict(
            ("data.global_batch_size", "loss.type"),
            f"loss.type={loss.type} compares the images of a batch with each other; use at least 2",
        )
    if data.batch_size == "auto" and training.accumulation_steps != 1:
        yield Conflict(
            ("training.accumulation_steps", "data.batch_size"),
            "data.batch_size: auto chooses the number of parts itself; leave it out",
        )
    elif data.batch_size != "auto" and data.batch_size % training.accumulation_steps:
        least = 2 if loss.has_image_level else 1
        above = max(math.ceil(data.batch_size / training.accumulation_steps), least) * training.accumulation_steps
        yield Conflict(
            ("data.batch_size", "training.accumulation_steps"),
            f"{data.batch_size} does not divide into training.accumulation_steps {training.accumulation_steps}; "
            f"use {above}",
        )
    elif loss.has_image_level and data.batch_size != "auto" and data.batch_size // training.accumulation_steps < 2:
        yield Conflict(
            ("data.batch_size", "loss.type"),
            f"loss.type={loss.type} compares the images of a batch with each other and needs at least 2 at a time; "
            f"use {2 * training.accumulation_steps}",
        )


def metric_checks(checkpoint: Checkpoint, evaluation: Evaluation, data: Data) -> Iterator[Conflict]:
    """Whether `checkpoint.metric` will ever be measured."""
    metric = checkpoint.metric
    if not checkpoint.needs_labels:
        return
    if not evaluation.eval_frequency:
        yield Conflict(
            ("checkpoint.metric", "evaluation.eval_frequency"),
            f"{metric} is measured at evaluations, and evaluation.eval_frequency is 0; use checkpoint.metric=loss",
        )
    if metric == "linear" and not evaluation.linear:
        yield Conflict(
            ("checkpoint.metric", "evaluation.linear"), "evaluation.linear=false measures no linear probe; use knn"
        )
    if all(dataset.name == "folder" for dataset in data.datasets):
        yield Conflict(
            ("checkpoint.metric", "data.datasets"),
            f"a folder of images has no labels to measure {metric} by; use checkpoint.metric=loss",
        )


def picture_checks(evaluation: Evaluation, logging: Logging) -> Iterator[Conflict]:
    """Whether `logging.use_pictures` will ever draw one."""
    if logging.use_pictures and not evaluation.eval_frequency:
        yield Conflict(
            ("logging.use_pictures", "evaluation.eval_frequency"),
            "pictures are drawn at evaluations, and evaluation.eval_frequency is 0; set one of the two",
        )


def _grid_checks(model: Model, data: Data, masking: Masking) -> Iterator[Conflict]:
    """Image size, patches and blocks."""
    patch = model.shape.patch_size
    if data.image_size % patch:
        yield Conflict(
            ("data.image_size", "model.patch_size", "model.encoder_type"),
            f"{data.image_size} is not a multiple of the patch size {patch}; use {_multiples(data.image_size, patch)}",
        )
        return
    side = data.image_size // patch
    min_side = 2 ** (model.num_hierarchies - 1)
    if side < min_side:
        yield Conflict(
            ("model.num_hierarchies", "data.image_size", "model.patch_size", "model.encoder_type"),
            f"{model.num_hierarchies} levels need a grid of {min_side} x {min_side} patches, and an image has "
            f"{side} x {side}; use at most {side.bit_length()}",
        )
    elif masking.num_masks:
        settings = (side, side, masking.num_masks, masking.mask_scale, masking.aspect_ratio, min_side)
        if not feasible_blocks(*settings):
            keys = ("mask_scale", "num_masks", "aspect_ratio")
            yield Conflict(
                (*(f"masking.{key}" for key in keys), "data.image_size", "model.patch_size", "model.num_hierarchies"),
                f"no block satisfies the masking settings on a {side} x {side} grid with {model.num_hierarchies} "
                f"level(s) (a block must hold a cell of {min_side} x {min_side}, and {masking.num_masks} must leave "
                f"something to see); nearest: {nearest_masking(*settings)}",
            )


def _multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return " or ".join(str(size) for size in (below, below + unit) if size)


def process_checks(data: Data, training: Training, num_processes: int) -> str | None:
    """What is wrong between the config and the number of processes that run it, if anything."""
    shares = training.accumulation_steps * num_processes
    if data.batch_size == "auto" or data.batch_size % shares == 0:
        return None
    return (
        f"data.batch_size: {data.batch_size} does not divide into {num_processes} process(es) x "
        f"training.accumulation_steps={training.accumulation_steps}; "
        f"use {-(-data.batch_size // shares) * shares}"
    )
