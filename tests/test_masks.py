import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hjepa.config import load_config
from hjepa.config.geometry import feasible_blocks
from hjepa.config.sections import Masking
from hjepa.errors import ConfigError
from hjepa.grid import Grid
from hjepa.masks import BlockMasks


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(4, 32),
    width=st.integers(4, 32),
    num_masks=st.integers(1, 6),
    low=st.floats(0.03, 0.3),
    spread=st.floats(0, 0.2),
    context=st.floats(0.3, 1.0),
    levels=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_masks_are_exact_inside_and_disjoint_from_the_context(
    height: int, width: int, num_masks: int, low: float, spread: float, context: float, levels: int, seed: int
) -> None:
    config = Masking(num_masks=num_masks, mask_scale=(low, low + spread), context_scale=(context, 1.0))
    assume(feasible_blocks(height, width, num_masks, config.mask_scale, config.aspect_ratio, 2 ** (levels - 1)))
    sampler = BlockMasks(config, Grid(height, width), levels)
    for step in range(3):
        masks = sampler.sample(seed, step, "v", np.arange(16))
        (h, w), num_context = sampler.geometry(seed, step)
        assert masks.context.shape == (16, num_context)
        assert masks.targets.shape == (16, num_masks, h, w)
        assert low - 1e-6 <= h * w / (height * width) <= low + spread + 1e-6
        assert 0.75 - 1e-6 <= h / w <= 1.5 + 1e-6
        assert min(h, w) >= 2 ** (levels - 1)
        rest = height * width - num_masks * h * w
        assert max(1, round(context * rest)) <= num_context <= rest
        for row in range(16):
            seen = masks.context[row]
            assert seen.unique().numel() == num_context
            assert (seen.diff() > 0).all()
            assert seen.min() >= 0
            assert seen.max() < height * width
            assert not torch.isin(seen, masks.targets[row]).any()
            for block in masks.targets[row]:
                # A block is a rectangle of neighbours: one corner says all.
                assert torch.equal(block - block[0, 0], torch.arange(h)[:, None] * width + torch.arange(w))
                assert block[0, 0] % width + w <= width
                assert block[-1, -1] < height * width


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 7), (8, 8), (14, 14), (6, 10)])
def test_every_patch_is_target_and_context_as_often_as_the_places_say(height: int, width: int) -> None:
    config = Masking(num_masks=3, mask_scale=(0.1, 0.25))
    sampler = BlockMasks(config, Grid(height, width), 1)
    draws = 6000
    corners = np.zeros(height * width)
    hidden, seen = np.zeros(height * width), np.zeros(height * width)
    masks = sampler.sample(5, 0, "v", np.arange(draws))
    (h, w), _ = sampler.geometry(5, 0)
    corners += np.bincount(masks.targets[:, :, 0, 0].flatten(), minlength=height * width)
    hidden += np.bincount(masks.targets.flatten(), minlength=height * width)
    seen += np.bincount(masks.context.flatten(), minlength=height * width)
    assert hidden.min() > 0
    assert seen.min() > 0
    # Corners are uniform over the places where a block fits: chi-square at p of about 1e-4.
    places = corners.reshape(height, width)[: height - h + 1, : width - w + 1].ravel()
    assert places.sum() == 3 * draws
    expected = 3 * draws / places.size
    degrees = places.size - 1
    assert ((places - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5 + 8
    # The last row and column are hidden as often as the first: the reference sampler never hides them.
    hidden = hidden.reshape(height, width)
    np.testing.assert_allclose(hidden[0].sum(), hidden[-1].sum(), rtol=0.15)
    np.testing.assert_allclose(hidden[:, 0].sum(), hidden[:, -1].sum(), rtol=0.15)


def test_a_mask_depends_on_its_address_alone() -> None:
    sampler = BlockMasks(Masking(), Grid(14, 14), 3)
    among = sampler.sample(1, 7, "v", np.arange(50, 90))
    alone = sampler.sample(1, 7, "v", np.asarray([60]))
    assert torch.equal(among.targets[10], alone.targets[0])
    assert torch.equal(among.context[10], alone.context[0])
    other = sampler.sample(1, 7, "w", np.asarray([60]))
    assert other.targets.shape == alone.targets.shape
    assert not torch.equal(other.targets, alone.targets)


def test_the_size_of_a_block_varies_over_steps() -> None:
    sampler = BlockMasks(Masking(), Grid(14, 14), 1)
    assert {sampler.geometry(0, step)[0] for step in range(200)} == set(sampler.blocks)
    assert len(sampler.blocks) > 2


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.image_size=32", "model.patch_size=8", "model.num_hierarchies=1"),
        ("data.image_size=224", "model.num_hierarchies=4"),
        ("data.image_size=224", "masking.num_masks=8"),
        ("data.image_size=32", "model.patch_size=4", "model.num_hierarchies=3"),
        ("data.image_size=224", "masking.mask_scale=[0.001,0.002]"),
        ("data.image_size=224", "masking.aspect_ratio=[9,10]"),
    ],
)
def test_impossible_masks_are_refused_and_what_is_offered_is_accepted(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"masking\.mask_scale: no block satisfies") as refused:
        load_config(None, overrides)
    offer = str(refused.value).split("nearest: ")[1].split()
    assert offer
    keys = {text.split("=")[0] for text in offer}
    load_config(None, [text for text in overrides if text.split("=")[0] not in keys] + offer)
