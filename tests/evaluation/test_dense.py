import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.data import Augmentation
from hjepa.config.sections import Evaluation
from hjepa.data.shapes import Shapes
from hjepa.data.views import Views
from hjepa.evaluation.dense import DenseProbe, patch_pixels
from hjepa.grid import Grid

CPU = torch.device("cpu")
GRID = Grid(8, 8)
TRAIN, TEST = Shapes(60, 0), Shapes(40, 0, "test")
PLAIN = Views(Augmentation(mean=(0, 0, 0), std=(1, 1, 1)), 64)


@pytest.fixture
def probe() -> DenseProbe:
    return DenseProbe(Evaluation(batch_size=16), GRID, (TRAIN, TEST), PLAIN, 0, CPU, CPU)


class Oracle:
    """Tokens that are made of the answer; it has to know which images it is shown, in their order."""

    def __init__(self, knows_where: bool, knows_what: bool) -> None:
        answers = []
        for source in (TRAIN, TEST):
            masks = torch.from_numpy(source.masks(torch.arange(len(source)).numpy())).float()
            where = F.adaptive_avg_pool2d(masks, 8).flatten(1)[..., None]
            what = F.one_hot(torch.from_numpy(source.labels), 10).float()[:, None].expand(-1, 64, -1)
            noise = torch.randn(len(source), 64, 4, generator=torch.Generator().manual_seed(1))
            answers.append(torch.cat([where * knows_where, what * knows_what, noise], dim=2))
        self.answers, self.shown = torch.cat(answers), 0

    def __call__(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return self.answers[self.shown - len(images) : self.shown]


@pytest.mark.parametrize(("where", "what"), [(True, True), (True, False), (False, True)])
def test_patches_that_know_are_told_from_those_that_do_not(probe: DenseProbe, where: bool, what: bool) -> None:
    oracle = Oracle(where, what)
    found = dict(probe(oracle))
    assert oracle.shown == probe.num_images == 100
    assert list(found) == ["patch_where", "patch_what"]
    assert (found["patch_where"] > 99) if where else (40 < found["patch_where"] < 60)
    assert (found["patch_what"] > 99) if what else (found["patch_what"] < 25)


def test_pixels_of_patches_know_a_little(probe: DenseProbe) -> None:
    """Objects are lighter than their ground, so where is easy; what an outline is, one patch hardly says."""
    found = dict(probe.baseline())
    assert 60 < found["patch_where"] < 99
    assert found["patch_what"] < 50


def test_patch_pixels_come_in_the_grids_order() -> None:
    images = torch.arange(2 * 3 * 64 * 64).float().view(2, 3, 64, 64)
    patches = patch_pixels(images, GRID)
    assert patches.shape == (2, 64, 3 * 8 * 8)
    torch.testing.assert_close(patches[1, 9].view(3, 8, 8), images[1, :, 8:16, 8:16])


def test_features_that_are_not_finite_are_no_reason_to_stop(probe: DenseProbe) -> None:
    found = dict(probe(lambda images: torch.full((len(images), 64, 3), float("nan"))))
    assert all(math.isnan(value) for value in found.values())
    assert len(found) == 2
