"""Patch filters that start from the data: random directions of whitened patches.

Neighbouring pixels say nearly the same, so a random filter sees mostly a patch's brightness. After whitening all
directions of a patch weigh alike (Coates and Ng 2012, "Learning feature representations with k-means").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.model.hjepa import HJEPA

# Patches from which the covariance is estimated, and the share of the mean variance that is added to each direction,
# so that those that hold noise alone are not blown up.
NUM_PATCHES = 100_000
FLOOR = 0.1


@torch.no_grad()
def whiten_patches(model: HJEPA, images: Tensor, seed: int) -> None:
    """Set the filters of both encoders; to be called before the first step.

    Args:
        model: its patch filters are `[D, 3, p, p]`.
        images: `[n, 3, S, S]` normalised, of the training set.
        seed: of the directions.
    """
    filters = model.context_encoder.backbone.vit.patch_embed.proj
    weight, bias = whitened_filters(images, filters.kernel_size[0], filters.out_channels, seed)
    filters.weight.copy_(weight)
    filters.bias.copy_(bias)
    if model.slow_encoder is not None:
        model.slow_encoder.copy_from_context_encoder(model.context_encoder)


def whitened_filters(images: Tensor, patch_size: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Filters whose outputs on patches of these images have mean 0 and, but for the floor, variance 1.

    Args:
        images: `[n, 3, S, S]` float32.
        patch_size: p, in pixels.
        count: D, number of filters.
        seed: of the directions.

    Returns:
        weight `[D, 3, p, p]` and bias `[D]`, float32 on the images' device.
    """
    # On the CPU: float64 for the small eigenvalues, and the same directions whatever the device.
    patches = F.unfold(images.cpu(), patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    patches = patches[:: -(-len(patches) // NUM_PATCHES)].double()
    mean = patches.mean(dim=0)
    spectrum, basis = torch.linalg.eigh(torch.cov((patches - mean).T, correction=0))
    scale = (spectrum.clamp(min=0) + FLOOR * spectrum.mean()).clamp(min=1e-6).rsqrt()  # of equal patches, finite
    directions = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    weight = F.normalize(directions, dim=1) @ (basis * scale) @ basis.T
    weight, bias = weight.float(), (-weight @ mean).float()
    return weight.view(count, 3, patch_size, patch_size).to(images.device), bias.to(images.device)
