"""What is minimised: a distance per level, and what keeps the embedding from collapsing.

Every term is logged under the name it has here and in the config.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.sections import Loss, SIGReg
from hjepa.model.hjepa import Output
from hjepa.model.pyramid import taps_of_level


class Losses(NamedTuple):
    """The number to minimise and, detached, the terms it is made of (0-d float32 tensors, on the device)."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Weighted sum over levels, plus VICReg (`combined`) or SIGReg (`sigreg`) on the embeddings of views."""

    def __init__(self, config: Loss, num_levels: int, taps: tuple[int, ...]) -> None:
        """Build from the config's `loss` section, for a model with these levels and tapped blocks."""
        self.config = config
        self.taps = taps
        self.weights = config.hierarchy_weights or tuple(0.5**level for level in range(num_levels))

    def __call__(self, output: Output, seed: int) -> Losses:
        """Compute the losses of a batch.

        Args:
            output: what the model returned.
            seed: of SIGReg's directions; the same on all processes, another at each step.
        """
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=output.target_tokens.device)
        for level, (prediction, target) in enumerate(zip(output.predictions, output.targets, strict=True)):
            per_tap = self._distance(prediction, target).mean(dim=(0, 1, 2, 3, 5))  # [T_l]
            for tap, loss in zip(self.taps[taps_of_level(len(self.taps), level)], per_tap, strict=True):
                terms[f"level{level}/tap{tap}"] = loss.detach()
            terms[f"level{level}"] = per_tap.mean().detach()
            total = total + self.weights[level] * per_tap.mean()

        if output.embeddings is not None:
            views = output.embeddings.float()
            if self.config.type == "combined":
                vicreg = self.config.vicreg
                parts = {
                    "vicreg/invariance": (vicreg.invariance_weight, invariance(views)),
                    "vicreg/variance": (vicreg.variance_weight, variance(views)),
                    "vicreg/covariance": (vicreg.covariance_weight, covariance(views)),
                }
                scale = vicreg.weight
            else:
                sigreg = self.config.sigreg
                parts = {
                    "sigreg/invariance": (1 - sigreg.mix, agreement(views, output.num_global)),
                    "sigreg/sigreg": (sigreg.mix, gaussianity(views, sigreg, seed)),
                }
                scale = sigreg.weight
            for name, (weight, value) in parts.items():
                terms[name] = value.detach()
                total = total + scale * weight * value
        return Losses(total, terms)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.config.type == "mse":
            return F.mse_loss(prediction.float(), target, reduction="none")
        return F.smooth_l1_loss(prediction.float(), target, reduction="none", beta=self.config.smoothl1_beta)


def agreement(views: Tensor, num_global: int) -> Tensor:
    """Mean squared distance of every view to the mean of its image's global ones (LeJEPA).

    Args:
        views: `[V, B, K]`, the `num_global` global ones first.
        num_global: G; where all views are global, this is their variance.
    """
    return (views - views[:num_global].mean(dim=0, keepdim=True)).square().mean()


def invariance(views: Tensor) -> Tensor:
    """Mean squared distance between two views of one image, over all pairs: `[V, B, K]` -> scalar (VICReg eq. 5)."""
    num_views = views.shape[0]
    return agreement(views, num_views) * (2 * num_views / (num_views - 1))


def variance(views: Tensor) -> Tensor:
    """Hinge on the standard deviation of each dimension over the batch, mean over views (VICReg eq. 1, 2)."""
    std = (views.var(dim=1) + 1e-4).sqrt()
    return F.relu(1 - std).mean()


def covariance(views: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances over the batch, per dimension, mean over views (VICReg eq. 3, 4)."""
    centred = views - views.mean(dim=1, keepdim=True)
    cov = centred.transpose(1, 2) @ centred / (views.shape[1] - 1)
    off_diagonal = cov.square().sum(dim=(1, 2)) - cov.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return (off_diagonal / views.shape[2]).mean()


def gaussianity(views: Tensor, config: SIGReg, seed: int) -> Tensor:
    """SIGReg: how far each view's embeddings are from a standard normal, seen along random directions.

    Along a unit direction the projections' empirical characteristic function is compared with the normal's,
    exp(-t^2 / 2), by the Epps-Pulley statistic: B times the squared difference, weighted by exp(-t^2 / 2) and
    integrated over [-t_max, t_max] by the trapezoid rule (LeJEPA, arXiv 2511.08544, section 4). The integrand is
    even, so half the interval is sampled and counted twice.

    Args:
        views: `[V, B, K]`.
        config: number of directions and knots.
        seed: of the directions.

    Returns:
        scalar, mean over directions and views; about 1.2 for standard normal samples of any size.
    """
    _, batch, dim = views.shape
    # Drawn on the CPU, so that every device and process has the same directions.
    directions = torch.randn(dim, config.num_slices, generator=torch.Generator().manual_seed(seed))
    directions = F.normalize(directions, dim=0)
    if views.is_cuda:
        directions = directions.pin_memory()  # the copy of what is not pinned waits for the device
    directions = directions.to(views.device, non_blocking=views.is_cuda)
    t = torch.linspace(0, config.t_max, config.num_knots, device=views.device)
    window = torch.exp(-t.square() / 2)
    trapezoid = torch.full_like(t, 2 * config.t_max / (config.num_knots - 1))
    trapezoid[0] /= 2
    trapezoid[-1] /= 2
    angles = (views @ directions).unsqueeze(-1) * t  # [V, B, S, T]
    error = (angles.cos().mean(dim=1) - window).square() + angles.sin().mean(dim=1).square()  # [V, S, T]
    return batch * (error @ (window * trapezoid)).mean()
