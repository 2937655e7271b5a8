"""What follows from the settings by arithmetic alone, so that it is refused before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hjepa.config.schema import Config


@dataclass(frozen=True)
class EncoderShape:
    """Width, depth, heads and patch side of an encoder."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int

    def nearest_heads(self) -> int:
        """The divisor of the width that is nearest to the number of heads asked for."""
        divisors = (n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0)
        return min(divisors, key=lambda n: abs(n - self.num_heads))


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
    """The encoder's shape: what the name says, less what is overridden."""
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
        scale = (
            min(mask_scale[0], math.floor(area * 1000) / 1000),
            max(mask_scale[1], math.ceil(area * 1000) / 1000),
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


def cross_checks(config: Config) -> None:
    """Refuse settings that are each fine and do not go together; all of them in one error.

    Raises:
        ValueError: one line per conflict, each with a value that would be accepted.
    """
    model, data, masking, training = config.model, config.data, config.masking, config.training
    shape = model.shape
    wrong = []

    if data.image_size % shape.patch_size:
        below = data.image_size // shape.patch_size * shape.patch_size
        near = [str(size) for size in (below, below + shape.patch_size) if size]
        wrong.append(
            f"data.image_size: {data.image_size} is not a multiple of the patch size {shape.patch_size}; "
            f"use {' or '.join(near)}"
        )
    else:
        side = data.image_size // shape.patch_size
        min_side = 2 ** (model.num_hierarchies - 1)
        settings = (side, side, masking.num_masks, masking.mask_scale, masking.aspect_ratio, min_side)
        if not feasible_blocks(*settings):
            wrong.append(
                f"masking: no block satisfies these settings on a {side} x {side} grid with "
                f"{model.num_hierarchies} level(s) (a block must hold a cell of {min_side} x {min_side}, and "
                f"{masking.num_masks} must leave something to see); nearest: {nearest_masking(*settings)}"
            )

    weights = config.loss.hierarchy_weights
    if weights is not None and len(weights) != model.num_hierarchies:
        wrong.append(
            f"loss.hierarchy_weights: {len(weights)} weights for {model.num_hierarchies} level(s) "
            f"(model.num_hierarchies); give {model.num_hierarchies}"
        )
    if training.warmup_epochs is not None and training.warmup_epochs >= training.epochs:
        wrong.append(
            f"training.warmup_epochs: {training.warmup_epochs:g} leaves nothing of {training.epochs} epochs; "
            f"at most {training.epochs - 1}"
        )
    if training.min_lr > training.lr:
        wrong.append(f"training.min_lr: {training.min_lr:g} is above training.lr {training.lr:g}")
    if data.batch_size % training.accumulation_steps:
        above = math.ceil(data.batch_size / training.accumulation_steps) * training.accumulation_steps
        wrong.append(
            f"data.batch_size: {data.batch_size} does not divide into training.accumulation_steps "
            f"{training.accumulation_steps}; use {above}"
        )
    if wrong:
        raise ValueError("\n".join(wrong))
