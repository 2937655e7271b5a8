"""What follows from the settings by arithmetic alone, so that it is refused before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hjepa.config.types import Conflict

if TYPE_CHECKING:
    from hjepa.config.schema import Config


@dataclass(frozen=True)
class EncoderShape:
    """Width, depth, heads and patch side of an encoder."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int

    def fitting(self, rotary: bool) -> str:
        """The setting nearest to this shape with which heads divide the width, as an override.

        Args:
            rotary: whether the width of a head has to be a multiple of 4.
        """
        unit = 4 if rotary else 1
        heads = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % (n * unit) == 0]
        if heads:
            return f"num_heads={min(heads, key=lambda n: abs(n - self.num_heads))}"
        # Half of it, the predictor's width, has to be a multiple of 4.
        step = math.lcm(self.num_heads * unit, 8)
        return f"embed_dim={max(1, round(self.embed_dim / step)) * step}"


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`."""
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))


OWN_SHAPE = "vit"
"""The encoder type whose shape is given in full by the config."""


# timm's names. Written out, so that a config can be checked without importing timm (seconds); a test holds the
# table against timm itself.
ENCODERS = {
    "vit_tiny_patch16_224": EncoderShape(192, 12, 3, 16),
    "vit_small_patch8_224": EncoderShape(384, 12, 6, 8),
    "vit_small_patch16_224": EncoderShape(384, 12, 6, 16),
    "vit_small_patch32_224": EncoderShape(384, 12, 6, 32),
    "vit_base_patch8_224": EncoderShape(768, 12, 12, 8),
    "vit_base_patch16_224": EncoderShape(768, 12, 12, 16),
    "vit_base_patch32_224": EncoderShape(768, 12, 12, 32),
    "vit_large_patch14_224": EncoderShape(1024, 24, 16, 14),
    "vit_large_patch16_224": EncoderShape(1024, 24, 16, 16),
    "vit_large_patch32_224": EncoderShape(1024, 24, 16, 32),
    "vit_huge_patch14_224": EncoderShape(1280, 32, 16, 14),
}


def encoder_shape(
    encoder_type: str,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
) -> EncoderShape:
    """The encoder's shape: what the name says, less what is overridden; all of it is given for `vit`."""
    if encoder_type == OWN_SHAPE:
        assert embed_dim
        assert depth
        assert num_heads
        assert patch_size
        return EncoderShape(embed_dim, depth, num_heads, patch_size)
    named = ENCODERS[encoder_type]
    return EncoderShape(
        embed_dim or named.embed_dim,
        depth or named.depth,
        num_heads or named.num_heads,
        patch_size or named.patch_size,
    )


def _fits(height: int, width: int, block: tuple[int, int], num_masks: int) -> bool:
    return num_masks * block[0] * block[1] < height * width


def feasible_blocks(
    height: int,
    width: int,
    num_masks: int,
    mask_scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    min_side: int,
) -> list[tuple[int, int]]:
    """Every block (h, w), in patches, that satisfies the masking settings on a grid.

    A block qualifies when its area is within `mask_scale` of the grid, its h / w within `aspect_ratio`, no side
    is below `min_side`, and `num_masks` of them leave at least one patch to see even where none overlap.
    """
    slack = 1e-9
    return [
        (h, w)
        for h in range(min_side, height + 1)
        for w in range(min_side, width + 1)
        if mask_scale[0] - slack <= h * w / (height * width) <= mask_scale[1] + slack
        and aspect_ratio[0] - slack <= h / w <= aspect_ratio[1] + slack
        and _fits(height, width, (h, w), num_masks)
    ]


def nearest_masking(
    height: int,
    width: int,
    num_masks: int,
    mask_scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    min_side: int,
) -> str:
    """The settings nearest to infeasible ones, as overrides a user can paste; fewer blocks as the last resort."""

    def distance(value: float, interval: tuple[float, float]) -> float:
        low, high = interval
        return max(math.log(low / value), math.log(value / high), 0.0)

    for count in range(num_masks, 0, -1):
        blocks = [
            (distance(h * w / (height * width), mask_scale) + distance(h / w, aspect_ratio), h, w)
            for h in range(min_side, height + 1)
            for w in range(min_side, width + 1)
            if _fits(height, width, (h, w), count)
        ]
        if not blocks:
            continue
        _, h, w = min(blocks)
        area, aspect = h * w / (height * width), h / w
        # Rounded outwards, so that what is offered is accepted.
        unit = 1000 if area > 0.01 else 10**7
        scale = (
            min(mask_scale[0], math.floor(area * unit) / unit),
            max(mask_scale[1], math.ceil(area * unit) / unit),
        )
        ratio = (
            min(aspect_ratio[0], math.floor(aspect * 100) / 100),
            max(aspect_ratio[1], math.ceil(aspect * 100) / 100),
        )
        parts = []
        if count != num_masks:
            parts.append(f"masking.num_masks={count}")
        if scale != tuple(mask_scale):
            parts.append(f"masking.mask_scale=[{scale[0]:g},{scale[1]:g}]")
        if ratio != tuple(aspect_ratio):
            parts.append(f"masking.aspect_ratio=[{ratio[0]:g},{ratio[1]:g}]")
        return " ".join(parts)
    return "a smaller patch, a larger image, or fewer levels (model.num_hierarchies)"


def cross_checks(config: Config) -> Iterator[Conflict]:
    """Settings of different sections that are each fine and do not go together."""
    model, data, masking, training, loss = config.model, config.data, config.masking, config.training, config.loss
    shape = model.shape
    yield from _grid_checks(config)

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


def _grid_checks(config: Config) -> Iterator[Conflict]:
    """Image size, patches and blocks."""
    model, data, masking = config.model, config.data, config.masking
    patch = model.shape.patch_size
    if data.image_size % patch:
        yield Conflict(
            ("data.image_size", "model.patch_size", "model.encoder_type"),
            f"{data.image_size} is not a multiple of the patch size {patch}; use {_multiples(data.image_size, patch)}",
        )
    elif masking.num_masks:
        side = data.image_size // patch
        min_side = 2 ** (model.num_hierarchies - 1)
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


def process_checks(config: Config, num_processes: int) -> str | None:
    """What is wrong between the config and the number of processes that run it, if anything."""
    shares = config.training.accumulation_steps * num_processes
    if config.data.batch_size == "auto" or config.data.batch_size % shares == 0:
        return None
    return (
        f"data.batch_size: {config.data.batch_size} does not divide into {num_processes} process(es) x "
        f"training.accumulation_steps={config.training.accumulation_steps}; "
        f"use {-(-config.data.batch_size // shares) * shares}"
    )
