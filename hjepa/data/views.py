"""Augmented views of a batch, computed on the device that trains.

What is random about a view is drawn on the CPU as a few numbers, each a function of (seed, position); what is
costly is done for a whole batch at once with matrix products and elementwise operations, which every device
has. Nothing looks at a value on another device, so the CPU never waits for it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hjepa import rng
from hjepa.config.data import Augmentation
from hjepa.data.transforms import (
    change_some,
    crop_resize,
    gaussian_blur,
    jitter_color,
    reflected_band,
    solarize,
    to_gray,
)

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

CROP_TRIES = 10
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # a jitter that leaves an image alone
# Of views that a CPU works on at a time: more does not stay in its caches, and is handed back to the system after each
# of a dozen steps. Of 64 views at 224 px on two cores, 170 a second become 320.
CPU_BYTES = 8_000_000


class ViewParameters(NamedTuple):
    """What happens to each of n images; drawn on the CPU, small enough to copy with every batch.

    Attributes:
        box: `[n, 4]` float32, top, left, height and width of the crop as shares of the stored image's sides.
        flip: `[n]` bool, mirrored left to right.
        jitter: `[n, 4]` float32, factors of brightness, contrast and saturation, and the shift of hue in
            turns; (1, 1, 1, 0) leaves an image alone.
        grayscale: `[n]` bool, colour removed.
        blur_sigma: `[n]` float32, standard deviation of the blur in pixels of the view; 0 for none.
        solarize: `[n]` bool, what is brighter than the middle is inverted.
    """

    box: Tensor
    flip: Tensor
    jitter: Tensor
    grayscale: Tensor
    blur_sigma: Tensor
    solarize: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ViewParameters:
        """The same parameters on another device."""
        return ViewParameters(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def packed(self) -> Tensor:
        """All as one `[n, 12]` float32: a batch has many views, and a small tensor travels as slowly as a large one."""
        flags = torch.stack([self.flip, self.grayscale, self.solarize], dim=1).float()
        return torch.cat([self.box, self.jitter, self.blur_sigma[:, None], flags], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> ViewParameters:
        """What was `packed`, on whichever device it lies now."""
        box, jitter, sigma, flags = packed.split([4, 4, 1, 3], dim=1)
        flip, grayscale, solarize = (flags > 0).unbind(1)
        return cls(box, flip, jitter, grayscale, sigma[:, 0], solarize)


def draw_views(config: Augmentation, seed: int, stream: str, positions: Int64, true_sizes: Float32) -> ViewParameters:
    """Draw the parameters of one view per position.

    Args:
        config: the ranges.
        seed, stream: name the random numbers; two views of one image need two streams.
        positions: `[n]` int64, place of each image in the run.
        true_sizes: `[n, 2]` float32, height and width in pixels before the image was squeezed for storage.

    Returns:
        Row i depends on nothing but (seed, stream, positions[i], true_sizes[i]).
    """

    def uniform(purpose: str, count: int) -> Float64:
        # One stream per purpose: a new option leaves the draws of the old ones as they were.
        return rng.uniform(seed, f"{stream}/{purpose}", positions, count)

    strength = np.array([config.color_jitter] * 3 + [_hue_jitter(config)])
    neutral = np.array(NEUTRAL)
    jitter = _between(neutral - strength, neutral + strength, uniform("jitter", 4))
    jittered = uniform("jittered", 1) < config.color_jitter_probability
    sigma = _between(*config.blur_sigma, uniform("sigma", 1))[:, 0]
    blurred = uniform("blurred", 1)[:, 0] < config.gaussian_blur
    return ViewParameters(
        box=_float(_draw_boxes(config, uniform("crop", 2 * CROP_TRIES + 2), true_sizes)),
        flip=torch.from_numpy(uniform("flip", 1)[:, 0] < config.horizontal_flip),
        jitter=_float(np.where(jittered, jitter, neutral)),
        grayscale=torch.from_numpy(uniform("grayscale", 1)[:, 0] < config.grayscale),
        blur_sigma=_float(np.where(blurred, sigma, 0.0)),
        solarize=torch.from_numpy(uniform("solarize", 1)[:, 0] < config.solarization),
    )


def center_views(true_sizes: Float32) -> ViewParameters:
    """The largest centred square (in true pixels) of each image and nothing else, for evaluation.

    Args:
        true_sizes: `[n, 2]` float32, height and width in pixels before the image was squeezed for storage.
    """
    n = len(true_sizes)
    shares = true_sizes.min(axis=1, keepdims=True) / true_sizes
    return ViewParameters(
        box=_float(np.concatenate([(1 - shares) / 2, shares], axis=1)),
        flip=torch.zeros(n, dtype=torch.bool),
        jitter=torch.tensor(NEUTRAL).repeat(n, 1),
        grayscale=torch.zeros(n, dtype=torch.bool),
        blur_sigma=torch.zeros(n),
        solarize=torch.zeros(n, dtype=torch.bool),
    )


class Views(nn.Module):
    """Carries the parameters out: crop and resize, flip, jitter, grayscale, blur, solarize, normalise.

    Each step computes what torchvision's function of that name computes on one float image. Jitter is applied
    in the order brightness, contrast, saturation, hue; torchvision's ColorJitter shuffles them at each call.
    A step that `config` gives no strength or probability is left out whatever the parameters say, so views
    for evaluation come cheapest from `plain_views`.
    """

    scale: Tensor
    shift: Tensor
    band: Tensor
    neutral: Tensor

    def __init__(self, config: Augmentation, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.jitters = max(config.color_jitter, _hue_jitter(config)) > 0 and config.color_jitter_probability > 0
        self.grayscales = config.grayscale > 0
        self.solarizes = config.solarization > 0
        self.blurs = config.gaussian_blur > 0 and image_size > 1
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.register_buffer("scale", (1 / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)
        self.register_buffer("neutral", torch.tensor(NEUTRAL), persistent=False)
        self.register_buffer("band", reflected_band(image_size) if self.blurs else None, persistent=False)

    def forward(self, images: Tensor, parameters: ViewParameters, out: Tensor | None = None) -> Tensor:
        """`[n, 3, H, W]` uint8 and parameters on its device -> `[n, 3, image_size, image_size]` float32.

        It is written to `out`, where that is given.
        """
        # Mixed precision is for the model: bfloat16 has fewer steps than a uint8 image.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            rows = max(1, CPU_BYTES // (3 * 4 * self.image_size**2))
            if images.device.type != "cpu" or len(images) <= rows:
                return self._draw(images, parameters, out)
            if out is None:
                out = torch.empty(len(images), 3, self.image_size, self.image_size)
            parts = zip(out.split(rows), images.split(rows), *(p.split(rows) for p in parameters), strict=True)
            for place, some, *drawn in parts:
                self._draw(some, ViewParameters(*drawn), place)
            return out

    def _draw(self, images: Tensor, parameters: ViewParameters, out: Tensor | None) -> Tensor:
        x = crop_resize(images, parameters.box, parameters.flip, self.image_size)
        if self.jitters:
            x = change_some(x, (parameters.jitter != self.neutral).any(dim=1), jitter_color, parameters.jitter)
        if self.grayscales:
            x = change_some(x, parameters.grayscale, to_gray)
        if self.blurs:
            sigma = parameters.blur_sigma
            x = change_some(x, sigma > 0, partial(gaussian_blur, band=self.band), sigma)
        if self.solarizes:
            x = change_some(x, parameters.solarize, solarize)
        return torch.addcmul(self.shift, x, self.scale, out=out)


def plain_views(config: Augmentation, image_size: int) -> Views:
    """Cuts, scales and normalises as `config` says, and nothing else."""
    return Views(Augmentation(mean=config.mean, std=config.std), image_size)


def _draw_boxes(config: Augmentation, uniform: Float64, true_sizes: Float32) -> Float64:
    """Random resized crops as torchvision draws them, but not rounded to pixels.

    Args:
        config: gives the ranges of area and aspect.
        uniform: `[n, 2 * CROP_TRIES + 2]` random numbers.
        true_sizes: `[n, 2]`, height and width in pixels.

    Returns:
        `[n, 4]`: top, left, height, width as shares of the sides.
    """
    sizes = true_sizes.astype(np.float64)
    height, width = sizes[:, :1], sizes[:, 1:]
    area, aspect, place = np.split(uniform, [CROP_TRIES, 2 * CROP_TRIES], axis=1)
    area = _between(*config.crop_scale, area) * height * width
    aspect = np.exp(_between(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]), aspect))
    # [n, tries, 2] height and width; below one pixel there is nothing to see.
    tries = np.maximum(np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=2), 1.0)
    fits = (tries <= sizes[:, None]).all(axis=2)
    first = tries[np.arange(len(tries)), fits.argmax(axis=1)]
    # Where none fits: the largest centred box whose aspect lies in the range.
    largest = np.minimum(sizes, np.hstack([width / config.crop_ratio[0], height * config.crop_ratio[1]]))
    fitted = fits.any(axis=1, keepdims=True)
    box = np.where(fitted, first, largest)
    corner = (sizes - box) * np.where(fitted, place, 0.5)
    return np.hstack([corner / sizes, box / sizes])


def _hue_jitter(config: Augmentation) -> float:
    return config.color_jitter / 4 if config.hue_jitter is None else config.hue_jitter


def _between(low: float | Float64, high: float | Float64, uniform: Float64) -> Float64:
    return low + (high - low) * uniform


def _float(array: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
