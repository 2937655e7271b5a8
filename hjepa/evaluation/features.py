"""Images through a frozen encoder, and what is taken from them without one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hjepa.data.source import Source
from hjepa.data.views import Views, center_views

# Normalised images `[n, 3, S, S]` float32 -> features `[n, d]` by name. Whoever makes it sees to eval mode.
Embed = Callable[[Tensor], dict[str, Tensor]]

PIXEL_SIDE = 32


def pixel_features(images: Tensor) -> Tensor:
    """The baseline without an encoder: the image itself, area-averaged to at most 32 pixels per side.

    Args:
        images: `[n, 3, S, S]` float32, normalised.

    Returns:
        `[n, 3 * min(S, 32)^2]` float32.
    """
    side = min(images.shape[-1], PIXEL_SIDE)
    if images.device.type == "mps" and images.shape[-1] % side:
        images = images.cpu()  # MPS averages over areas of equal size only
    return F.adaptive_avg_pool2d(images, side).flatten(1)


@torch.no_grad()
def collect(
    embed: Embed,
    source: Source,
    indices: NDArray[np.int64],
    views: Views,
    batch_size: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of the largest centred square of each image.

    Args:
        embed: the frozen encoder; see `Embed`.
        source: images with labels.
        indices: `[n]` int64, which of them, n >= 1.
        views: cuts, scales and normalises; on the device, without jitter or blur.
        batch_size: images per forward pass.
        device: where views and features are computed.

    Returns:
        Features by name, each `[n, d]` float32 on the CPU, and labels `[n]` int64 on the CPU. An image that cannot
        be read is replaced by another of the source, with that one's label.
    """
    assert source.labels is not None
    assert len(indices)
    features: dict[str, Tensor] = {}
    labels = np.empty(len(indices), np.int64)
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        read = source.read(part)
        images = torch.from_numpy(read.images).to(device)
        squares = center_views(read.true_sizes).to(device)
        labels[start : start + len(part)] = source.labels[read.indices]
        for name, rows in embed(views(images, squares)).items():
            # Written into place: concatenation at the end would hold everything twice.
            if name not in features:
                features[name] = torch.empty(len(indices), rows.shape[1])
            features[name][start : start + len(part)] = rows
    return features, torch.from_numpy(labels)
