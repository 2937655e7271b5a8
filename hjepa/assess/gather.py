"""Features of all images by all subjects, in one pass over the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hjepa.assess.pictures import Pictures
from hjepa.assess.subjects import Subject

# Above this, pooled features are kept in half precision; up to this, tokens are kept at all, else computed again.
HALF_ABOVE = 1 << 30
TOKENS_UP_TO = 1 << 30

Key = tuple[str, str]
"""Names of a subject and of a feature."""


@torch.no_grad()
def pooled_features(
    pictures: Pictures, subjects: Sequence[Subject], batch_size: int, progress: Callable[[int], None]
) -> dict[Key, Tensor]:
    """`[n, d]` of every feature of every subject, on the CPU.

    Args:
        pictures: the images; their labels are known afterwards.
        subjects: what makes features of them.
        batch_size: images per forward pass.
        progress: called with the number of images that are done.
    """
    found: dict[Key, Tensor] = {}
    n = len(pictures)
    for rows in torch.split(torch.arange(n), batch_size):
        images = pictures.plain(rows)
        here = {(s.name, feature): f for s in subjects for feature, f in s.pooled(images).items()}
        if not found:
            size = 4 * n * sum(features.shape[1] for features in here.values())
            dtype = torch.float16 if size > HALF_ABOVE else torch.float32
            found = {key: torch.empty(n, features.shape[1], dtype=dtype) for key, features in here.items()}
        for key, features in here.items():
            found[key][rows] = features.to("cpu", found[key].dtype)
        progress(int(rows[-1]) + 1)
    return found


class Tokens:
    """All tokens `[b, N, d]` of images by number: kept in half precision where they fit, else computed when asked for.

    Args:
        pictures: the images.
        subject, feature: whose.
        batch_size: images per forward pass.
    """

    def __init__(self, pictures: Pictures, subject: Subject, feature: str, batch_size: int) -> None:
        self._pictures, self._subject, self._feature, self._batch = pictures, subject, feature, batch_size
        self._kept: Tensor | None = None
        one = self._compute(torch.arange(1))
        if 2 * one.numel() * len(pictures) <= TOKENS_UP_TO:
            self._kept = torch.empty(len(pictures), *one.shape[1:], dtype=torch.float16)
            for rows in torch.split(torch.arange(len(pictures)), batch_size):
                self._kept[rows] = self._compute(rows).to("cpu", torch.float16)
        self._device = one.device

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """`[b]` int64 -> `[b, N, d]`, on the subject's device."""
        if self._kept is not None:
            return self._kept[rows].to(self._device)
        return torch.cat([self._compute(part) for part in torch.split(rows, self._batch)])

    @torch.no_grad()
    def _compute(self, rows: Tensor) -> Tensor:
        return self._subject.maps(self._pictures.plain(rows))[self._feature].flatten(1, 2)
