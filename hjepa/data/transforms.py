"""What is done to the pixels of a batch of views: matrix products and elementwise operations, all images at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, rounded as torchvision rounds it


def change_some(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`change(images, *parameters)` for the images `[n, ...]` that are chosen (`[n]` bool); parameters are `[n, ...]`.

    On a CPU the others are left out of the work, and `images` is written to. Elsewhere looking at what is chosen would
    make the CPU wait for the device, so all are changed and some kept.
    """
    if images.device.type != "cpu":
        return torch.where(chosen.view(-1, *[1] * (images.ndim - 1)), change(images, *parameters), images)
    rows = chosen.nonzero()[:, 0]
    if len(rows) == len(images):
        return change(images, *parameters)
    return images.index_copy_(0, rows, change(images[rows], *(values[rows] for values in parameters)))


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


def to_gray(images: Tensor) -> Tensor:
    """Colour removed: `[n, 3, h, w]` -> the same."""
    return luma(images).repeat(1, 3, 1, 1)


def solarize(images: Tensor) -> Tensor:
    """What is brighter than the middle is inverted: `[n, 3, h, w]` in [0, 1] -> the same."""
    return torch.where(images >= 0.5, 1 - images, images)


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


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
