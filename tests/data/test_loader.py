import numpy as np
import pytest
import torch

from hjepa.build import grid_of
from hjepa.config import load_config
from hjepa.data.loader import Batch, Batches
from hjepa.data.sources import open_training
from hjepa.data.views import Views
from hjepa.data.workers import Loader
from hjepa.errors import DataError
from hjepa.masks import BlockMasks

BASE = ("data.datasets=[{name: shapes, length: 40}]", "data.image_size=32", "model.patch_size=4", "data.batch_size=8")


def plan(*overrides: str, rank: int = 0, world_size: int = 1, parts: int = 1) -> Batches:
    config = load_config(None, (*BASE, *overrides))
    masks = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    return Batches(config.data, open_training(config.data, 0), masks, 0, parts, rank, world_size)


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [*batch.images, *batch.masks, *(p for view in batch.views for p in view), batch.positions]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_started_late_goes_on_where_another_would_be(workers: int) -> None:
    batches = plan(f"data.num_workers={workers}")
    whole = list(Loader(batches, 0, 8, False))
    late = list(Loader(batches, 5, 8, False))
    assert len(whole) == 8
    for a, b in zip(whole[5:], late, strict=True):
        assert type(b) is Batch
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert torch.equal(x, y)


def test_processes_and_parts_share_the_same_global_batch() -> None:
    whole = plan()
    for step in (0, 7):
        shared = []
        for rank in range(2):
            batches = plan(rank=rank, world_size=2, parts=2)
            shared += [*batches.positions(2 * step), *batches.positions(2 * step + 1)]
        assert sorted(shared) == whole.positions(step).tolist()


def test_an_epoch_has_no_image_twice_and_the_next_has_another_order() -> None:
    batches = plan()
    assert batches.steps_per_epoch == 5
    seen = [batches.locate(np.concatenate([batches.positions(s) for s in range(5 * e, 5 * e + 5)]))[1] for e in (0, 1)]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(40))
    assert seen[0].tolist() != seen[1].tolist()


def test_views_of_one_image_differ_and_are_rendered_to_one_size() -> None:
    batches = plan("data.num_views=3", "data.augmentation.color_jitter=0.4")
    batch = batches[0]
    images = batch.render(Views(batches.config.augmentation, 32))
    assert images.shape == (3, 8, 3, 32, 32)
    assert batch.masks.context.shape[0] == 24
    assert (images[0] - images[1]).abs().mean() > 0.1


def test_a_batch_beyond_the_data_names_one_that_fits() -> None:
    with pytest.raises(DataError, match=r"64 is more than an epoch's 40 images; use data\.batch_size=40"):
        plan("data.batch_size=64")


@pytest.mark.parametrize(("processes", "parts"), [(64, 1), (1, 64), (8, 8)])
def test_data_smaller_than_its_shares_says_so(processes: int, parts: int) -> None:
    said = rf"40 image\(s\) an epoch do not divide into {processes} process\(es\) x .*={parts}; .*epoch_size=64"
    with pytest.raises(DataError, match=said):
        plan("data.batch_size=64", world_size=processes, parts=parts)
    assert plan("data.batch_size=64", "data.epoch_size=64", world_size=processes, parts=parts).steps_per_epoch == 1


CROPS = ("data.multicrop.num_local_crops=3", "loss.type=sigreg", "data.augmentation.color_jitter=0.4")


def test_local_crops_are_small_views_of_small_parts() -> None:
    batches = plan(*CROPS, "data.multicrop.local_crop_size=16", "data.multicrop.local_crop_scale=[0.05,0.2]")
    batch = batches[0]
    assert len(batch.crops) == 3
    areas = torch.stack([crop.box[:, 2] * crop.box[:, 3] for crop in batch.crops])
    assert areas.min() >= 0.05 - 1e-5
    assert areas.max() <= 0.2 + 1e-5
    drawn = batch.render_crops(Views(batches.config.augmentation, 16))
    assert drawn is not None
    assert drawn.shape == (3, 8, 3, 16, 16)
    assert (drawn[0] - drawn[1]).abs().mean() > 0.1
    # Only views are masked; crops are seen whole.
    assert batch.masks.context.shape[0] == 8


def test_local_crops_leave_everything_else_as_it_was() -> None:
    with_crops, without = plan(*CROPS)[2], plan(*CROPS[1:])[2]
    assert without.crops == ()
    assert without.render_crops(Views(plan().config.augmentation, 16)) is None
    for a, b in zip(tensors(with_crops), tensors(without), strict=True):
        assert torch.equal(a, b)


def test_a_crop_is_the_same_whichever_part_it_is_drawn_in() -> None:
    whole = plan(*CROPS)[3]
    for part in range(2):
        batch = plan(*CROPS, parts=2)[6 + part]
        rows = torch.isin(whole.positions, batch.positions)
        for a, b in zip(whole.crops, batch.crops, strict=True):
            order = whole.positions[rows].argsort()[batch.positions.argsort().argsort()]
            assert torch.equal(a.box[rows][order], b.box)
