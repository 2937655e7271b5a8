"""What single patches know: where an object is, and which.

An embedding of the whole image can be bought with the patches' own: every token may come to say the same thing. So
where a source knows which pixels are of an object, frozen tokens are probed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.sections import Evaluation
from hjepa.data.source import Int64, Source
from hjepa.data.views import Views, center_views
from hjepa.evaluation.probes import linear_probe
from hjepa.grid import Grid

# Normalised images `[n, 3, S, S]` float32 -> a feature of each patch `[n, N, d]`, in the grid's order.
Tokens = Callable[[Tensor], Tensor]

NUM_TRAIN, NUM_TEST = 512, 256
# Share of a patch that lies on an object: above the first it is one, below the second it is background. What is
# between is not asked for, since its right answer is a matter of taste.
OBJECT, BACKGROUND = 0.3, 0.05


def patch_pixels(images: Tensor, grid: Grid) -> Tensor:
    """The baseline without an encoder: the pixels of each patch, `[n, 3, S, S]` -> `[n, N, 3 p^2]`."""
    side = images.shape[-1] // grid.width
    return F.unfold(images, side, stride=side).transpose(1, 2)


class DenseProbe:
    """Linear probes of single tokens, fitted as the linear probe of whole images is (`linear_probe`).

    `patch_where`: object or background, 50 % by chance.
    `patch_what`: the class of the object, on patches that lie on one.

    As many patches of each kind and class are asked for, so that neither answer helps with the other.
    """

    def __init__(
        self,
        config: Evaluation,
        grid: Grid,
        pair: tuple[Source, Source],
        views: Views,
        seed: int,
        device: torch.device,
        probe_device: torch.device,
    ) -> None:
        """Choose the images.

        Args:
            config: the section.
            grid: patches of an image.
            pair: train and test part of a source that has masks and labels.
            views: cut, scale, normalise.
            seed: of the parts on which regularisation is chosen.
            device: where tokens are computed.
            probe_device: where probes are fitted.
        """
        self._config, self._grid, self._views, self._seed = config, grid, views, seed
        self._device, self._probe_device = device, probe_device
        self._parts = [
            (source, np.arange(min(limit, len(source)), dtype=np.int64))
            for source, limit in zip(pair, (NUM_TRAIN, NUM_TEST), strict=True)
        ]
        self._num_classes = pair[0].num_classes
        self.num_images = sum(len(indices) for _, indices in self._parts)

    def __call__(self, tokens: Tokens) -> Iterator[tuple[str, float]]:
        """Probe an encoder.

        Yields:
            `patch_where`, `patch_what`: top-1 accuracy in percent on patches of the test part.
        """
        sides = [self._collect(tokens, source, indices) for source, indices in self._parts]
        (train, train_share, train_class), (test, test_share, test_class) = sides
        (train_where, train_what), (test_where, test_what) = (
            _questions(share, classes, self._num_classes)
            for share, classes in ((train_share, train_class), (test_share, test_class))
        )
        for name, train_label, test_label, num_classes in (
            ("patch_where", train_where, test_where, 2),
            ("patch_what", train_what, test_what, self._num_classes),
        ):
            fit, ask = train_label >= 0, test_label >= 0
            if not fit.any() or not ask.any():
                continue
            if not (train.isfinite().all() and test.isfinite().all()):
                yield name, float("nan")
                continue
            found = linear_probe(
                train[fit],
                train_label[fit],
                test[ask],
                test_label[ask],
                l2=self._config.linear_l2,
                num_classes=num_classes,
                seed=self._seed,
            )
            yield name, found.accuracy

    def baseline(self) -> Iterator[tuple[str, float]]:
        """The same of the pixels of each patch."""
        yield from self(lambda images: patch_pixels(images, self._grid))

    @torch.no_grad()
    def _collect(self, tokens: Tokens, source: Source, indices: Int64) -> tuple[Tensor, Tensor, Tensor]:
        """Features `[n N, d]`, share on an object `[n N]` and class `[n N]` of every patch."""
        assert source.labels is not None
        features, shares = [], []
        for start in range(0, len(indices), self._config.batch_size):
            part = indices[start : start + self._config.batch_size]
            squares = center_views(source.true_sizes(part)).to(self._device)
            images = self._views(torch.from_numpy(source.images(part)).to(self._device), squares)
            features.append(tokens(images).float().flatten(0, 1).to(self._probe_device))
            masks = source.masks(part)
            assert masks is not None
            assert source.size[0] == source.size[1], "a mask is not cut to the centred square"
            covered = F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), (self._grid.height, self._grid.width))
            shares.append(covered.flatten().to(self._probe_device))
        classes = torch.from_numpy(source.labels[indices]).repeat_interleave(self._grid.size).to(self._probe_device)
        return torch.cat(features), torch.cat(shares), classes


def _questions(share: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels of what is asked, -1 elsewhere: object (1) or background (0), and the class of an object.

    Args:
        share: `[m]` of each patch on an object.
        classes: `[m]` int64 of its image.
        num_classes: number of classes.

    Returns:
        two `[m]` int64.
    """
    where, what = torch.full_like(classes, -1), torch.full_like(classes, -1)
    kinds = (share < BACKGROUND, share > OBJECT)
    patches = [[torch.nonzero(kind & (classes == c))[:, 0] for c in range(num_classes)] for kind in kinds]
    count = min(len(some) for of_kind in patches for some in of_kind)
    evenly = torch.arange(count, device=share.device)
    for value, of_kind in enumerate(patches):
        for label, some in enumerate(of_kind):
            chosen = some[evenly * len(some) // max(count, 1)]
            where[chosen] = value
            if value:
                what[chosen] = label
    return where, what
