"""What follows from the settings by arithmetic alone, so that it is refused before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
