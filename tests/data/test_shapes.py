"""The built-in source: the same picture wherever it is asked for, and a class that can be seen."""

import numpy as np
import pytest

from hjepa.data.shapes import CLASSES, OUTLINES, Shapes

LENGTH = 400


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return Shapes(LENGTH, seed=3)


@pytest.fixture(scope="module")
def everything(shapes: Shapes) -> np.ndarray:
    return shapes.images(np.arange(LENGTH))


def lightness(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float64).mean(1)


def test_shapes_and_dtypes(shapes: Shapes, everything: np.ndarray):
    assert len(shapes) == LENGTH
    assert shapes.size == (64, 64)
    assert everything.shape == (LENGTH, 3, 64, 64)
    assert everything.dtype == np.uint8
    masks = shapes.masks(np.arange(5))
    assert masks.shape == (5, 64, 64)
    assert masks.dtype == np.bool_
    assert shapes.labels.shape == (LENGTH,)
    assert shapes.labels.dtype == np.int64
    assert shapes.nbytes == everything.nbytes


def test_no_images_are_no_images(shapes: Shapes):
    nothing = np.arange(0)
    assert shapes.images(nothing).shape == (0, 3, 64, 64)
    assert shapes.masks(nothing).shape == (0, 64, 64)
    assert Shapes(0, seed=3).labels.shape == (0,)


@pytest.mark.parametrize("batch", [1, 3, 7, 65])
def test_an_image_does_not_depend_on_its_batch(shapes: Shapes, everything: np.ndarray, batch: int):
    order = np.random.default_rng(0).permutation(LENGTH)[: 3 * batch]
    masks = shapes.masks(np.arange(LENGTH))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        np.testing.assert_array_equal(shapes.images(indices), everything[indices])
        np.testing.assert_array_equal(shapes.masks(indices), masks[indices])


def test_an_index_may_come_twice(shapes: Shapes, everything: np.ndarray):
    np.testing.assert_array_equal(shapes.images(np.asarray([5, 9, 5])), everything[[5, 9, 5]])


def test_a_longer_set_begins_with_the_shorter(shapes: Shapes, everything: np.ndarray):
    longer = Shapes(10 * LENGTH, seed=3)
    np.testing.assert_array_equal(longer.labels[:LENGTH], shapes.labels)
    np.testing.assert_array_equal(longer.images(np.arange(20)), everything[:20])


def test_every_image_is_another(everything: np.ndarray):
    assert len(np.unique(everything.reshape(LENGTH, -1), axis=0)) == LENGTH


@pytest.mark.parametrize("other", [Shapes(LENGTH, seed=4), Shapes(LENGTH, seed=3, split="test")])
def test_seeds_and_splits_share_nothing(shapes: Shapes, everything: np.ndarray, other: Shapes):
    assert 0.05 < np.mean(other.labels == shapes.labels) < 0.15  # chance is 0.1
    first = other.images(np.arange(50))
    assert not any((everything == image).all((1, 2, 3)).any() for image in first)


@pytest.mark.parametrize("outside", [-1, LENGTH])
def test_an_index_outside_is_refused(shapes: Shapes, outside: int):
    with pytest.raises(AssertionError):
        shapes.images(np.asarray([0, outside]))


def test_labels_are_balanced_and_shuffled(shapes: Shapes):
    assert set(shapes.labels) == set(range(10))
    assert shapes.num_classes == len(CLASSES) == 10
    for length in (10, 100, LENGTH):
        np.testing.assert_array_equal(np.bincount(shapes.labels[:length], minlength=10), length // 10)
    # No place in a decade prefers a class: 40 decades, each place sees most classes.
    assert all(len(set(column)) >= 8 for column in shapes.labels.reshape(-1, 10).T)


def test_the_mask_marks_an_object_in_each_quarter(shapes: Shapes):
    masks = shapes.masks(np.arange(LENGTH))
    for quarter in (masks[:, :32, :32], masks[:, :32, 32:], masks[:, 32:, :32], masks[:, 32:, 32:]):
        share = quarter.mean((1, 2))
        assert share.min() > 0.03
        assert share.max() < 0.6
        assert 0.1 < share.mean() < 0.35


def test_the_object_stands_out(shapes: Shapes, everything: np.ndarray):
    masks, light = shapes.masks(np.arange(LENGTH)), lightness(everything)
    inside = (light * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (light * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    contrast = (inside - outside) / 255
    assert contrast.min() > 0.12
    assert contrast.mean() > 0.3


def test_colour_and_place_do_not_tell_the_class():
    shapes = Shapes(4000, seed=0)
    indices = np.arange(len(shapes))
    corner = shapes.images(indices)[:, :, :6, :6].mean((2, 3))
    means = np.stack([corner[shapes.labels == label].mean(0) for label in range(10)])
    # The mean over 400 images of a class wavers by about 55 / sqrt(400) = 2.8 grey levels.
    assert np.abs(means - corner.mean(0)).max() < 12


def test_no_outline_reaches_beyond_its_radius():
    """A distance that stays negative far away would paint the whole image."""
    angle = np.linspace(0, 2 * np.pi, 360).astype(np.float32)
    for name, outline in OUTLINES.items():
        assert outline(1.4 * np.cos(angle), 1.4 * np.sin(angle)).min() > 0, name


def test_outlines_keep_their_class_when_flipped():
    y, x = np.meshgrid(np.linspace(-1, 1, 65), np.linspace(-1, 1, 65), indexing="ij")
    for name, outline in OUTLINES.items():
        np.testing.assert_allclose(outline(x, y), outline(-x, y), atol=1e-6, err_msg=name)


def test_edges_are_smooth():
    """Along the rim there are pixels between the two paints: no staircase."""
    shapes = Shapes(50, seed=1)
    indices = np.arange(50)
    masks, light = shapes.masks(indices), lightness(shapes.images(indices))
    rim = masks[:, :, 1:] != masks[:, :, :-1]
    step = np.abs(np.diff(light, axis=2))
    full = np.abs(light[:, :, 3:] - light[:, :, :-3])[:, :, :]
    # A hard edge makes its whole step between two neighbours; a smooth one spreads it over three.
    assert step[rim].mean() < 0.8 * full[rim[:, :, 1:-1]].mean()


def test_the_class_can_be_read_from_the_mask():
    """Outlines, cut out of one quarter and brought to one size, are told apart by their nearest neighbour."""
    shapes = Shapes(600, seed=2)
    masks = shapes.masks(np.arange(600))[:, :32, :32]
    grid = (np.arange(24) + 0.5) / 24
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        boxes.append(box[(grid * box.shape[0]).astype(int)][:, (grid * box.shape[1]).astype(int)].ravel())
    flat = np.asarray(boxes, np.float32) - 0.5
    nearest = (flat[500:] @ flat[:500].T).argmax(1)
    assert (shapes.labels[:500][nearest] == shapes.labels[500:]).mean() > 0.6
