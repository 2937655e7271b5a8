import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa.rng import bits, permute, scalar_seed, uniform


def test_a_row_depends_on_its_position_alone() -> None:
    alone = uniform(3, "s", np.asarray([17]), 5)
    among = uniform(3, "s", np.arange(40)[::-1], 5)
    np.testing.assert_array_equal(alone[0], among[22])


def test_longer_rows_begin_with_shorter_ones() -> None:
    np.testing.assert_array_equal(uniform(1, "s", np.arange(3), 4), uniform(1, "s", np.arange(3), 9)[:, :4])


@pytest.mark.parametrize("other", [(4, "s", 0), (3, "t", 0), (3, "s", 1)])
def test_seed_stream_and_position_each_matter(other: tuple[int, str, int]) -> None:
    seed, stream, position = other
    assert not np.array_equal(bits(3, "s", np.asarray([0]), 8), bits(seed, stream, np.asarray([position]), 8))


def test_uniform_is_uniform_and_uncorrelated() -> None:
    x = uniform(0, "s", np.arange(4000), 8)
    assert x.min() >= 0
    assert x.max() < 1
    counts = np.histogram(x, bins=32, range=(0, 1))[0]
    expected = x.size / 32
    assert ((counts - expected) ** 2 / expected).sum() < 62  # chi-square, 31 degrees, p = 0.001
    assert np.abs(np.corrcoef(x.T) - np.eye(8)).max() < 0.06  # between draws
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.06  # between neighbours


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(0, 10**6))
def test_permutation_is_a_bijection(size: int, seed: int, round_: int) -> None:
    out = permute(seed, "p", np.full(size, round_), np.arange(size), size)
    np.testing.assert_array_equal(np.sort(out), np.arange(size))


def test_permutations_of_two_rounds_differ_and_each_moves_everything_around() -> None:
    a, b = (permute(0, "p", np.full(1000, r), np.arange(1000), 1000) for r in (0, 1))
    assert (a == b).mean() < 0.02
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.12


def test_permutation_of_a_billion_costs_what_is_asked_for() -> None:
    out = permute(0, "p", np.zeros(100, np.int64), np.arange(100), 10**9)
    assert len(set(out.tolist())) == 100
    assert out.max() > 10**8


def test_scalar_seed_fits_a_generator() -> None:
    assert 0 <= scalar_seed(2**62, "s", 2**40) < 2**63
