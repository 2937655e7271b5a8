"""Augmented views of a batch, computed on the device that trains.

What is random about a view is drawn on the CPU as a few numbers, each a function of (seed, position); what is
costly is done for a whole batch at once with matrix products and elementwise operations, which every device
has. Nothing here looks at a value on the device, so the CPU never waits for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hjepa import rng
from hjepa.config.data import Augmentation

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

CROP_TRIES = 10
# Of views that a CPU works on at a time: more does not stay in its caches, and is handed back to the system after each
# of a dozen steps. Of 64 views at 224 px on two cores, 170 a second become 320.
CPU_BYTES = 8_000_000
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, rounded as torchvision rounds it


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
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
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
        jitter=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1),
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
        self.register_buffer("band", reflected_band(image_size) if self.blurs else None, persistent=False)

    def forward(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """`[n, 3, H, W]` uint8 and parameters on its device -> `[n, 3, image_size, image_size]` float32."""
        # Mixed precision is for the model: bfloat16 has fewer steps than a uint8 image.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            rows = max(1, CPU_BYTES // (3 * 4 * self.image_size**2))
            if images.device.type != "cpu" or len(images) <= rows:
                return self._draw(images, parameters)
            out = torch.empty(len(images), 3, self.image_size, self.image_size)
            parts = zip(out.split(rows), images.split(rows), *(p.split(rows) for p in parameters), strict=True)
            for place, some, *drawn in parts:
                place.copy_(self._draw(some, ViewParameters(*drawn)))
            return out

    def _draw(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        x = crop_resize(images, parameters.box, parameters.flip, self.image_size)
        if self.jitters:
            x = jitter_color(x, parameters.jitter)
        if self.grayscales:
            x = torch.where(_column(parameters.grayscale), luma(x), x)
        if self.blurs:
            x = gaussian_blur(x, parameters.blur_sigma, self.band)
        if self.solarizes:
            x = torch.where(_column(parameters.solarize) & (x >= 0.5), 1 - x, x)
        return torch.addcmul(self.shift, x, self.scale)


def plain_views(config: Augmentation, image_size: int) -> Views:
    """Cuts, scales and normalises as `config` says, and nothing else."""
    return Views(Augmentation(mean=config.mean, std=config.std), image_size)


def crop_resize(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut a box out of each image, bring it to one size and mirror it where asked.

    Args:
        images: `[n, 3, H, W]` uint8.
        box: `[n, 4]` float32, top, left, height, width as shares of the sides.
        flip: `[n]` bool.
        size: side of the result in pixels.

    Returns:
        `[n, 3, size, size]` float32 in [0, 1]; bilinear and antialiased.
    """
    n, _, height, width = images.shape
    top, left, box_height, box_width = box.unbind(1)
    rows = resize_weights(top * height, box_height * height, torch.zeros_like(flip), height, size)
    columns = resize_weights(left * width, box_width * width, flip, width, size)
    # With the channels between the two image axes both products are plain batched ones, without a copy of the
    # weights per channel.
    x = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = torch.bmm(rows.div_(255), x.view(n, height, 3 * width))
    x = torch.bmm(x.view(n, size * 3, width), columns.transpose(1, 2))
    return x.view(n, size, 3, size).transpose(1, 2).contiguous()


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, size_in: int, size_out: int) -> Tensor:
    """How much each pixel of a line counts in each pixel of the resized piece of it.

    Args:
        start, length: `[n]` float32, the piece in pixels of the line.
        flip: `[n]` bool, the result is reversed.
        size_in, size_out: pixels of the line and of the result.

    Returns:
        `[n, size_out, size_in]` float32; rows sum to one.
    """
    start, step = start[:, None], (length / size_out)[:, None]
    pixel = torch.arange(size_in, dtype=torch.float32, device=start.device)
    index = torch.arange(size_out, dtype=torch.float32, device=start.device) + 0.5
    index = torch.where(flip[:, None], size_out - index, index)
    center = start + step * index
    # A triangle as wide as an output pixel, but never narrower than the input's: that is "antialias".
    reach = step.clamp(min=1)
    distance = ((pixel + 0.5) / reach)[:, None, :] - (center / reach)[:, :, None]
    weights = distance.abs_().neg_().add_(1).clamp_(min=0)
    # Nothing outside of the piece is seen; a pixel that is cut by its end counts by the part inside.
    inside = torch.minimum(pixel + 1, start + length[:, None]) - torch.maximum(pixel, start)
    weights *= inside.clamp(min=0)[:, None, :]
    return weights.div_(weights.sum(dim=2, keepdim=True))


def jitter_color(images: Tensor, jitter: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue: `[n, 3, h, w]` in [0, 1] and `[n, 4]` -> `[n, 3, h, w]`."""
    brightness, contrast, saturation, hue = (_column(value) for value in jitter.unbind(1))
    x = (images * brightness).clamp_(max=1)
    x = torch.lerp(luma(x.mean(dim=(2, 3), keepdim=True)), x, contrast).clamp_(0, 1)
    x = torch.lerp(luma(x), x, saturation).clamp_(0, 1)
    return shift_hue(x, hue[:, 0])


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV: `[n, 3, h, w]` in [0, 1] and `[n, 1, 1]` turns in [-1/2, 1/2] -> `[n, 3, h, w]`.

    Saturation and value need not be computed: both keep their place when the largest and the smallest channel
    keep theirs, and every channel is then a piecewise linear function of hue between these two.
    """
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    # Hue in sixths of a turn, red at 0. Without chroma the numerators are 0 and any divisor will do.
    per_chroma = 1 / chroma.clamp(min=1e-12)
    from_green = torch.where(high == green, (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4)
    hue = torch.where(high == red, (green - blue) * per_chroma, from_green)
    hue = torch.remainder(hue + 6 * turns, 6)
    below_high = (
        (2 - (hue - 3).abs_()).clamp_(0, 1),
        (hue - 2).abs_().sub_(1).clamp_(0, 1),
        (hue - 4).abs_().sub_(1).clamp_(0, 1),
    )
    return torch.stack([torch.addcmul(high, chroma, part, value=-1) for part in below_high], dim=1)


def luma(images: Tensor) -> Tensor:
    """Gray value: `[n, 3, h, w]` -> `[n, 1, h, w]`."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blur_radius(size: int) -> int:
    """Radius of the blur's kernel: together an odd number near a tenth of the image, at least 3 pixels."""
    return max(1, round(size / 20))


def reflected_band(size: int) -> Tensor:
    """Where the kernel's pixels lie when the image is continued by reflection.

    Returns:
        `[kernel, size, size]` float32 of 0 and 1: [k, i, j] is 1 where weight k of output pixel i falls on j.
    """
    radius = blur_radius(size)
    place = (torch.arange(size) + torch.arange(-radius, radius + 1)[:, None]).abs()
    place = (size - 1) - ((size - 1) - place).abs()
    return nn.functional.one_hot(place, size).float()


def gaussian_blur(images: Tensor, sigma: Tensor, band: Tensor) -> Tensor:
    """Blur each image by its own width.

    Args:
        images: `[n, 3, size, size]` float32.
        sigma: `[n]` float32 in pixels, 0 for none.
        band: `[kernel, size, size]`, see `reflected_band`.
    """
    n, _, size, _ = images.shape
    radius = len(band) // 2
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32, device=sigma.device)
    # At a thousandth of a pixel the kernel is one 1 among zeros, which is what no blur means.
    kernel = torch.softmax(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]).square(), dim=1)
    weights = (kernel @ band.flatten(1)).view(n, size, size)
    x = torch.bmm(images.view(n, 3 * size, size), weights.transpose(1, 2))
    return torch.matmul(weights[:, None], x.view(n, 3, size, size))


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


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
