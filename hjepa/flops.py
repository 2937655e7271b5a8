"""Operations of a training step, counted from the shapes of its matrix products."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from hjepa.build import grid_of
from hjepa.config import Config
from hjepa.grid import cells
from hjepa.masks import BlockMasks
from hjepa.model.pyramid import spread_taps, taps_of_level

FORWARD_BACKWARD = 3  # a product's gradient is two products of its size


class Flops(NamedTuple):
    """Floating-point operations per image, forward and backward; a multiplication and an addition are two.

    Only matrix products, attention's included; what is computed twice for `training.use_gradient_checkpointing` is not
    counted twice, nor is the optimizer.

    Attributes:
        target: the pass that makes the targets.
        context: the context encoder, local crops included.
        predictor: the predictor with its heads.
        image_level: projector and SIGReg's directions.
    """

    target: float
    context: float
    predictor: float
    image_level: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def flops_per_image(config: Config, step: int = 0) -> Flops:
    """What one image of a batch costs in a step, all of its views together.

    Args:
        config: of a run.
        step: of the run; blocks and contexts have the size of that step.
    """
    model, data, loss = config.model, config.data, config.loss
    grid, shape = grid_of(config), model.shape
    dim, pixels = shape.embed_dim, 3 * shape.patch_size**2
    masks = BlockMasks(config.masking, grid, model.num_hierarchies)
    (height, width), num_context = masks.geometry(config.experiment.seed, step)
    predicts = loss.predicts

    def embed(tokens: int) -> float:
        return 2.0 * tokens * pixels * dim

    def encoder(tokens: int) -> float:
        return shape.depth * _block(tokens, dim, 4.0)

    # Patches have no gradient of their own, so embedding them is one product backward.
    context = data.num_views * (2 * embed(grid.size) + FORWARD_BACKWARD * encoder(num_context))
    side = data.local_size(shape.patch_size) // shape.patch_size
    crops = data.multicrop.num_local_crops
    context += crops * (2 * embed(side**2) + FORWARD_BACKWARD * encoder(side**2))

    target = predictor = 0.0
    if predicts:
        every = data.num_views / loss.predict_every
        target = every * (embed(grid.size) + encoder(grid.size))
        predictor = every * FORWARD_BACKWARD * _predictor(config, num_context, height, width)

    image_level = _image_level(config) if loss.has_image_level else 0.0
    return Flops(target, context, predictor, image_level)


def _image_level(config: Config) -> float:
    """Projector and regulariser of one image's views, forward and backward."""
    model, loss = config.model, config.loss
    views = config.data.num_views + config.data.multicrop.num_local_crops
    out = model.projector.output_dim
    sizes = [model.shape.embed_dim, *[model.projector.hidden_dim] * model.projector.depth, out]
    once = 2.0 * sum(a * b for a, b in itertools.pairwise(sizes))
    flops = views * FORWARD_BACKWARD * once
    if views == 1:
        views, flops = 2, flops + once  # the second opinion is the target encoder's, without gradient
    if loss.type == "sigreg":
        return flops + views * 2 * 2.0 * out * loss.sigreg.num_slices  # directions have no gradient
    return flops + views * FORWARD_BACKWARD * 2.0 * out**2


def _block(tokens: int, dim: int, mlp_ratio: float) -> float:
    """A transformer block, forward: queries, keys, values and output, the MLP, and attention's two products."""
    return tokens * (8 + 4 * mlp_ratio) * dim**2 + 4.0 * tokens**2 * dim


def _predictor(config: Config, num_context: int, height: int, width: int) -> float:
    """The predictor's pass over one image, forward."""
    model = config.model
    wide, settings = model.shape.embed_dim, model.predictor
    dim = settings.embed_dim or wide // 2
    num_taps = len(model.target_layers or spread_taps(model.shape.depth))
    sizes = [cells(height, width, level) for level in range(model.num_hierarchies)]
    queries = [config.masking.num_masks * rows * columns for rows, columns in sizes]
    flops = 2.0 * num_context * wide * dim
    if settings.attention == "cross":
        asked = sum(queries)
        own = asked * (4 + 4 * settings.mlp_ratio) * dim**2  # query, output, MLP
        flops += settings.depth * (own + 4.0 * num_context * dim**2 + 4.0 * asked * num_context * dim)
    else:
        flops += settings.depth * _block(num_context + sum(queries), dim, settings.mlp_ratio)
    out = dim
    if model.fpn.use_fpn:
        out = model.fpn.feature_dim or dim
        flops += sum(2.0 * count * dim * out for count in queries)
        if model.fpn.fusion_method == "concat":
            flops += sum(2.0 * count * 2 * out * out for count in queries[:-1])
    for level, count in enumerate(queries):
        taps = len(range(num_taps)[taps_of_level(num_taps, level)])
        flops += 2.0 * count * out * taps * wide
    return flops
