"""Ridge regression as a classifier, solved exactly for a whole grid of regularisations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that are turned into float64 at a time.
ROW_BLOCK = 8192


class Ridge:
    """One-vs-all ridge regression on standardised features, in float64.

    With z = (x - mean) / deviation over the n training rows, Y the `[n, C]` one-hot labels and p their column
    means,

        W = argmin |Z W + 1 p' - Y|^2 + l2 n |W|^2 = (Z'Z + l2 n I)^-1 Z'Y = Z' (ZZ' + l2 n I)^-1 Y

    and the class of x is argmax(z W + p). The bias p is exact and not penalised because Z is centred, which
    is also why Y needs no centring. The smaller of the two systems is solved. A feature that does not vary
    beyond the rounding of float32 counts as constant and gets no weight.

    Args:
        features: `[n, d]` float.
        labels: `[n]` int64 in [0, num_classes).
        num_classes: number of classes, C.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        n, d = features.shape
        self.rows = n
        self.mean = _sum(x.sum(0) for x in _float64(features)) / n
        variance = _sum((x - self.mean).square().sum(0) for x in _float64(features)) / n
        varies = variance > torch.finfo(torch.float32).eps ** 2 * (variance + self.mean.square())
        self.scale = torch.where(varies, variance, torch.inf).rsqrt()
        self.prior = torch.bincount(labels, minlength=num_classes).double() / n
        if d <= n:
            self._lift: Tensor | None = None
            self._system = features.new_zeros(d, d, dtype=torch.float64)
            self._right = features.new_zeros(d, num_classes, dtype=torch.float64)
            for x, c in zip(_float64(features), torch.split(labels, ROW_BLOCK), strict=True):
                z = self._standardise(x)
                self._system.addmm_(z.T, z)
                self._right.addmm_(z.T, F.one_hot(c, num_classes).double())
        else:
            z = self._standardise(features.double())
            self._lift = z.T
            self._system = z @ z.T
            self._right = F.one_hot(labels, num_classes).double()

    def weights(self, l2: Sequence[float]) -> Iterator[Tensor]:
        """`W [d, C]` for each regularisation; one eigendecomposition serves a whole grid."""
        if len(l2) == 1:  # a plain solve costs a tenth of it
            eye = torch.eye(len(self._system), dtype=torch.float64, device=self._system.device)
            yield self._lifted(torch.linalg.solve(self._system + l2[0] * self.rows * eye, self._right))
            return
        spectrum, basis = torch.linalg.eigh(self._system)
        spectrum = spectrum.clamp(min=0)[:, None]  # rounding makes some of a singular system's negative
        right = basis.T @ self._right
        for value in l2:
            yield self._lifted(basis @ (right / (spectrum + value * self.rows)))

    def leave_one_out(self, features: Tensor, labels: Tensor, l2: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """`W [d, C]` for each regularisation, and the scores that each row gets from a fit without it.

        In closed form (Allen 1974): with y the row of Y, s = z W + p and h = z (Z'Z + l2 n I)^-1 z' + 1/n, a fit
        without it gives y - (y - s) / (1 - h), where features are centred without it, too, and divided by the
        deviations of all. Its class frequencies, in which its own class is rarer by one, speak against it each time;
        those of all rows stand in their place.

        Args:
            features, labels: those of the constructor.
            l2: positive.

        Yields:
            `W` as `weights` does, and `[n, C]` float64.
        """
        spectrum, basis = torch.linalg.eigh(self._system)
        spectrum = spectrum.clamp(min=0)
        # Z in the basis of the eigenvectors of Z'Z, `[n, r]`.
        rotated = self._standardise(features.double()) @ basis if self._lift is None else basis * spectrum.sqrt()
        targets = F.one_hot(labels, len(self.prior)).double()
        rarer = (targets - self.prior) / max(1, self.rows - 1)
        inner, right = rotated.T @ targets, basis.T @ self._right
        for value in l2:
            shrunk = spectrum + value * self.rows
            scores = rotated @ (inner / shrunk[:, None]) + self.prior
            leverage = (rotated.square() / shrunk).sum(dim=1, keepdim=True) + 1 / self.rows
            left_out = targets - (targets - scores) / (1 - leverage) + rarer
            yield self._lifted(basis @ (right / shrunk[:, None])), left_out

    def predict(self, features: Tensor, weights: Tensor) -> Tensor:
        """`[m, d]` features and `W [d, C]` -> `[m]` int64 classes."""
        return torch.cat([self._scores(x, weights).argmax(1) for x in _float64(features)])

    def scores(self, features: Tensor, weights: Tensor) -> Tensor:
        """`[m, d]` features and `W [d, C]` -> `[m, C]` float32: the class is the argmax, 0 to 1 what is aimed at."""
        return torch.cat([self._scores(x, weights).float() for x in _float64(features)])

    def _scores(self, x: Tensor, weights: Tensor) -> Tensor:
        return self._standardise(x) @ weights + self.prior

    def _standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale

    def _lifted(self, solution: Tensor) -> Tensor:
        return solution if self._lift is None else self._lift @ solution


def _float64(features: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in torch.split(features, ROW_BLOCK))


def _sum(blocks: Iterator[Tensor]) -> Tensor:
    total = next(blocks)
    for block in blocks:
        total = total + block
    return total
