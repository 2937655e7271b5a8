import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa.data.mixture import Mixture


def epoch_of(mixture: Mixture, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    place = np.arange(mixture.epoch_size)
    return mixture.locate(np.full_like(place, epoch), place)


def test_concat_visits_every_image_once_an_epoch_in_another_order() -> None:
    mixture = Mixture([30, 70], [1, 1], "concat", None, 0)
    orders = []
    for epoch in (0, 1):
        source, index = epoch_of(mixture, epoch)
        assert sorted(zip(source, index, strict=True)) == [(0, i) for i in range(30)] + [(1, i) for i in range(70)]
        orders.append(source * 1000 + index)
    assert (orders[0] != orders[1]).mean() > 0.9


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.05, 10), min_size=5, max_size=5),
    epoch_size=st.integers(100, 1000),
)
def test_shares_are_the_weights(sizes: list[int], weights: list[float], epoch_size: int) -> None:
    weights = weights[: len(sizes)]
    mixture = Mixture(sizes, weights, "weighted", epoch_size, 3)
    for epoch in (0, 5):
        source, index = epoch_of(mixture, epoch)
        share = np.bincount(source, minlength=len(sizes)) / epoch_size
        np.testing.assert_allclose(share, np.asarray(weights) / sum(weights), atol=0.01)
        assert (index < np.asarray(sizes)[source]).all()


def test_balanced_ignores_sizes_and_weights() -> None:
    source, _ = epoch_of(Mixture([10, 1000], [9, 1], "balanced", 500, 0), 2)
    assert np.bincount(source).tolist() == [250, 250]


def test_a_source_is_walked_through_before_an_image_returns() -> None:
    mixture = Mixture([7, 50], [0.5, 0.5], "weighted", 40, 1)
    drawn = [index[source == 0] for source, index in (epoch_of(mixture, e) for e in range(14))]
    drawn_in_order: list[int] = []
    for epoch in range(14):
        place = np.arange(40)
        source, index = mixture.locate(np.full(40, epoch), place)
        drawn_in_order += index[source == 0].tolist()
    assert len(drawn_in_order) == 14 * 20 == sum(map(len, drawn))
    assert np.bincount(drawn_in_order).tolist() == [40] * 7


def test_two_seeds_differ_and_one_repeats() -> None:
    a, b, c = (epoch_of(Mixture([100], [1], "concat", None, seed), 0)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.9


@pytest.mark.parametrize("size", [10**9])
def test_a_billion_images_cost_nothing(size: int) -> None:
    source, index = Mixture([size, size], [1, 1], "concat", None, 0).locate(np.arange(4), np.arange(4))
    assert source.max() <= 1
    assert index.max() < size
