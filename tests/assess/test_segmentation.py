"""Classes of pixels: the probe on answers that are known, and the folder of masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from hjepa.assess.scenes import of_folders
from hjepa.config.data import Data
from hjepa.errors import DataError
from hjepa.evaluation.segmentation import Scenes, mean_iou, patch_classes, segment
from hjepa.evaluation.task import Figure
from hjepa.grid import Grid

CPU = torch.device("cpu")
GRID = Grid(4, 4)


def quilts(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 16 px whose patches of 4 px are of one class each, some ignored: `[n, 3, 16, 16]`, `[n, 16, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (n, 4, 4), generator=generator)
    classes[torch.rand(n, 4, 4, generator=generator) < 0.1] = 255
    maps = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
    noise = torch.randn(n, 3, 16, 16, generator=generator)
    return noise + 3 * torch.stack([(maps == c).float() for c in range(3)], dim=1), maps.byte()


def scenes(images: Tensor, maps: Tensor) -> Scenes:
    return Scenes(len(images), lambda rows: (images[rows], maps[rows]))


def means(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)


def probed(train: Scenes, test: Scenes, tokens=means) -> dict[str, Figure]:  # type: ignore[no-untyped-def]
    settings = {"num_classes": 3, "l2": (1e-3, 1.0), "batch_size": 7, "seed": 0, "device": CPU}
    return dict(segment(tokens, train, test, grid=GRID, **settings))


def test_the_figures_are_torchmetrics_of_the_same_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    told, true = (torch.randint(4, (500,), generator=generator) for _ in range(2))
    true[:50] = 255
    known = true != 255
    confusion = torch.bincount(true[known] * 4 + told[known], minlength=16).view(4, 4)
    theirs = multiclass_jaccard_index(told[known], true[known], num_classes=4, average="macro")
    assert mean_iou(confusion) == pytest.approx(float(theirs), abs=1e-6)
    # A class that is nowhere has no say; one that was told and is nowhere counts as missed.
    assert mean_iou(torch.tensor([[3, 0, 0], [0, 5, 0], [0, 0, 0]])) == 1.0
    assert mean_iou(torch.tensor([[3, 0, 1], [0, 5, 0], [0, 0, 0]])) == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_patches_that_know_their_class_are_told() -> None:
    train, test = scenes(*quilts(40, 1)), scenes(*quilts(20, 2))
    found = probed(train, test)
    assert found["patch_accuracy"].value > 97
    assert found["miou"].value > 80  # bilinear scores blur the seams
    blind = probed(train, test, lambda images: torch.ones(len(images), 16, 2))
    assert blind["patch_accuracy"].value < 45
    lost = probed(train, test, lambda images: torch.full((len(images), 16, 2), float("nan")))
    assert all(np.isnan(figure.value) for figure in lost.values())


def test_patch_accuracy_is_torchmetrics_without_what_is_ignored() -> None:
    images, maps = quilts(20, 2)
    shown: list[Tensor] = []

    def oracle(images: Tensor) -> Tensor:
        shown.append(images)
        return means(images)

    found = probed(scenes(*quilts(40, 1)), scenes(images, maps), oracle)["patch_accuracy"]
    wanted = patch_classes(maps, GRID, 3).flatten()
    guess = means(images).flatten(0, 1).argmax(1)  # what a linear classifier of these can hardly miss
    theirs = multiclass_accuracy(guess, wanted.where(wanted >= 0, 3), 4, ignore_index=3, average="micro")
    assert found.value == pytest.approx(100 * float(theirs), abs=1.5)
    assert sum(len(part) for part in shown) == 60


def test_the_most_frequent_class_of_a_patch() -> None:
    maps = torch.zeros(1, 8, 8, dtype=torch.uint8)
    maps[0, :4, :3], maps[0, :4, 4:] = 2, 255
    maps[0, 4:, :4] = 255
    maps[0, 4:, 0] = 1
    maps[0, 4:, 4:6] = 1
    assert patch_classes(maps, Grid(2, 2), 3).tolist() == [[2, -1, 1, 0]]


# ---- folders of images and masks


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve images of varying size, the left half of each of class 3."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for number in range(12):
        width, height = 30 + number, 24 + 2 * number
        for folder in (images / "deep", masks / "deep"):
            folder.mkdir(parents=True, exist_ok=True)
        classes = np.zeros((height, width), np.uint8)
        classes[:, : width // 2] = 3
        classes[0] = 255
        pixels = np.repeat((80 * classes)[..., None], 3, axis=2)
        Image.fromarray(pixels).save(images / "deep" / f"{number:02d}.jpg")
        Image.fromarray(classes).save(masks / "deep" / f"{number:02d}.png")
    return images, masks


DATA = Data(image_size=16)


def opened(folders: tuple[Path, Path]):  # type: ignore[no-untyped-def]
    return of_folders(*folders, DATA, 0, CPU, (1000, 1000))


def test_masks_lie_on_their_images(folders: tuple[Path, Path]) -> None:
    segmented = opened(folders)
    assert (segmented.train.size, segmented.test.size, segmented.num_classes) == (11, 1, 4)
    images, maps = segmented.train.read(torch.arange(11))
    assert (images.shape, maps.shape, maps.dtype) == ((11, 3, 16, 16), (11, 16, 16), torch.uint8)
    for image, classes in zip(images, maps, strict=True):
        object_, ground = image.mean(0)[classes == 3], image.mean(0)[classes == 0]
        assert object_.quantile(0.2) > ground.quantile(0.8)
    palette = Image.open(folders[1] / "deep" / "00.png").convert("P")
    palette.save(folders[1] / "deep" / "00.png")  # of a palette its numbers count
    assert opened(folders).num_classes == 4


def test_folders_may_be_divided(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        (folder / "deep").rename(folder / "train")
        (folder / "val").mkdir()
        for file in sorted((folder / "train").iterdir())[:5]:
            file.rename(folder / "val" / file.name)
    segmented = opened(folders)
    assert (segmented.train.size, segmented.test.size) == (7, 5)
    (folders[0] / "val").rename(folders[0] / "rest")
    with pytest.raises(DataError, match="has train/ but no val/ or test/"):
        opened(folders)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", r"03\.jpg: has no mask \(looked for .*masks/deep/03\.png\)$"),
        ("size", r"03\.png: 5 x 7 pixels, and its image .*03\.jpg has 30 x 33; a mask has the size of its image$"),
        ("colour", r"03\.png: a mask is a PNG of class numbers, one channel; this one is in colour \(RGB\)$"),
        ("jpeg", r"03\.png: cannot be read as a PNG"),
        ("one class", r"masks: all pixels are of one class \(0\); 255 means ignored"),
        ("no folder", r"--masks .*masks: no such folder$"),
        ("many", r"03\.png: holds the class 300; classes are 0 to 254, 255 is ignored$"),
    ],
)
def test_what_does_not_fit_is_one_line(folders: tuple[Path, Path], fault: str, said: str) -> None:
    masks = folders[1]
    third = masks / "deep" / "03.png"
    if fault == "missing":
        third.unlink()
    elif fault == "size":
        Image.new("L", (7, 5)).save(third)
    elif fault == "colour":
        Image.new("RGB", (33, 30)).save(third)
    elif fault == "jpeg":
        Image.new("L", (33, 30)).save(third, format="JPEG")
    elif fault == "many":
        Image.fromarray(np.full((30, 33), 300, np.uint16)).save(third)
    elif fault == "no folder":
        masks.rename(masks.with_name("elsewhere"))
    else:
        for file in (masks / "deep").iterdir():
            with Image.open(file) as image:
                size = image.size
            Image.new("L", size).save(file)
    with pytest.raises(DataError, match=said) as caught:
        opened(folders)
    assert len(str(caught.value).splitlines()) == 1
