"""Signs of collapse, read from features across images.

A feature that no longer depends on the image is collapsed, whatever its norm: the standard deviation *over the
channels* after a layer norm reads 1.0 on a dead encoder. So spread is measured over images, at a fixed place,
before any norm, in units of the features' own size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def relative_std(features: Tensor) -> Tensor:
    """How much features depend on the image: std over images at each place and channel over the root mean square.

    Args:
        features: `[n, ..., D]` float, n images.

    Returns:
        0-d float32: 0 when every image gives the same features, near 1 when the mean image explains nothing.
    """
    x = features.float()
    spread = x.var(dim=0, unbiased=False).mean()
    return (spread / x.square().mean().clamp_min(1e-12)).sqrt()


def explained(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the targets' variance that a prediction explains (the coefficient of determination).

    A loss says little by itself: it falls when predictions improve, and also when targets collapse and there is
    nothing left to predict.

    Args:
        prediction, target: `[n, ..., D]` float; the variance of a channel is over everything before it.

    Returns:
        0-d float32: 1 for a perfect prediction, 0 for the mean target, negative for worse; nan of constant targets.
    """
    x, y = prediction.float().flatten(0, -2), target.float().flatten(0, -2)
    spread = y.var(dim=0, unbiased=False).mean()
    # What rounding leaves of constant targets is no variance.
    spread = torch.where(spread > 1e-10 * y.square().mean(), spread, torch.nan)
    return 1 - (x - y).square().mean() / spread


def drift(slow: Iterable[Tensor], fast: Iterable[Tensor]) -> Tensor:
    """Distance between two sets of weights, relative to the size of the second; 0-d float32."""
    old, new = list(slow), list(fast)
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(old, new))).norm()
    size: Tensor = torch.stack(torch._foreach_norm(new)).norm()
    relative: Tensor = apart / size
    return relative.float()


def rankme(features: Tensor) -> Tensor:
    """Effective rank of a batch of embeddings (RankMe, Garrido et al. 2023, eq. 1).

    exp of the entropy of the singular values normalised to sum 1. The mean is removed first, since a constant
    embedding is the collapse that the raw matrix would call rank one at best.

    Args:
        features: `[n, D]`.

    Returns:
        0-d float32 between 0 (constant) and min(n - 1, D); nan where a feature is not finite.
    """
    # float64 on the CPU: the small singular values are the message, and MPS has neither svd nor float64.
    raw = features.detach().cpu().double()
    if not torch.isfinite(raw).all():
        return torch.tensor(float("nan"))
    x = raw - raw.mean(dim=0)
    # From the smaller of the two products: up to seven times as fast as svdvals, and what squaring loses of the small
    # values is a billionth of the rank.
    values = torch.linalg.eigvalsh(x @ x.mT if len(x) < x.shape[1] else x.mT @ x).clamp_min(0).sqrt()
    # What rounding leaves of a constant batch is not rank.
    total = values.sum()
    if total <= 1e-6 * raw.norm().clamp_min(1e-12):
        return torch.zeros(())
    p = values / total
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).float()
