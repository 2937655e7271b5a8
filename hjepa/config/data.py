"""The `data` section: which images, how many at once, how they are shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hjepa.config.types import (
    AsFloat,
    BatchSize,
    Bool,
    Conflict,
    Few,
    Float,
    Int,
    Pixels,
    Positive,
    Ratio,
    Scale,
    Section,
    Share,
    Str,
    Unit,
    Weight,
)


class Dataset(Section):
    """One source of the mixture."""

    name: Literal["shapes", "cifar10", "cifar100", "stl10", "imagenet", "imagefolder", "folder"] = Field(
        description="kind of source; folder takes any nested folder without labels"
    )
    path: Str | None = Field(None, description="where the images lie; data.data_path when not given")
    weight: Scale = Field(1.0, description="share of the samples under sampling_strategy: weighted")
    split: Literal["train", "test", "val", "unlabeled", "train+unlabeled"] | None = Field(
        None, description="part that is trained on; train (stl10: train+unlabeled) when not given"
    )
    length: Positive | None = Field(None, description="number of images; shapes only (20000 when not given)")

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        if self.length is not None and self.name != "shapes":
            yield Conflict(
                ("length", "name"), f"is for the procedural source shapes; {self.name} has as many images as it has"
            )
        if self.split in ("unlabeled", "train+unlabeled") and self.name != "stl10":
            yield Conflict(("split", "name"), f"{self.split!r} exists for stl10 only; {self.name} has train and test")
        elif self.split is not None and self.name == "folder":
            yield Conflict(("split", "name"), "folder has no splits; leave split out")
        if self.path is not None and self.name == "shapes":
            yield Conflict(("path", "name"), "shapes is drawn, not read; leave path out")
        if self.path is None and self.name in ("folder", "imagefolder", "imagenet"):
            yield Conflict(("path", "name"), f"{self.name} needs a path")


class Augmentation(Section):
    """What makes one view of an image; parameters follow torchvision's transforms."""

    crop_scale: Share = Field((0.3, 1.0), description="share of the image's area that a crop covers")
    crop_ratio: Ratio = Field((0.75, 4 / 3), description="aspect (width over height) of a crop")
    horizontal_flip: Unit = Field(0.5, description="probability of mirroring left to right")
    color_jitter: Unit = Field(
        0.0, description="strength s: brightness, contrast and saturation vary by a factor 1 - s to 1 + s"
    )
    hue_jitter: Annotated[float, Field(ge=0, le=0.5), AsFloat] | None = Field(
        None, description="largest turn of the hue, as a part of the circle; a quarter of color_jitter when not given"
    )
    color_jitter_probability: Unit = Field(0.8, description="probability that an image is jittered")
    grayscale: Unit = Field(0.0, description="probability of removing colour")
    gaussian_blur: Unit = Field(0.0, description="probability of blurring")
    blur_sigma: Ratio = Field((0.1, 2.0), description="standard deviation of the blur in pixels")
    solarization: Unit = Field(0.0, description="probability of inverting what is brighter than the middle")
    mean: tuple[Float, Float, Float] = Field((0.485, 0.456, 0.406), description="subtracted per channel, 0..1")
    std: tuple[Scale, Scale, Scale] = Field((0.229, 0.224, 0.225), description="divided by per channel, 0..1")


class Multicrop(Section):
    """Small views of small parts, which agree with the whole at the image level (Caron et al. 2020)."""

    num_local_crops: Annotated[Int, Field(ge=0, le=16)] = Field(
        0, description="local crops of each image beside its num_views global views"
    )
    local_crop_size: Pixels | None = Field(
        None, description="side of a local crop in pixels; 3/7 of image_size in whole patches when not given"
    )
    local_crop_scale: Share = Field((0.05, 0.3), description="share of the image's area that a local crop covers")


def folder_section(path: str) -> dict[str, Any]:
    """What `data: <path>` stands for: any nested folder of images."""
    return {"datasets": [{"name": "folder", "path": path}]}


class Data(Section):
    """Images: which, how many at once, how they are shown."""

    datasets: Annotated[tuple[Dataset, ...], Field(min_length=1)] = Field(
        (Dataset(name="shapes"),), description="sources of the mixture"
    )
    data_path: Str = Field("./data", description="folder for sources without a path of their own")
    download: Bool = Field(True, description="fetch cifar10, cifar100 and stl10 where they are missing")
    sampling_strategy: Literal["weighted", "balanced", "concat"] = Field(
        "concat", description="shares of the sources: their weights, equal, or by size"
    )
    epoch_size: Positive | None = Field(None, description="samples per epoch; the sum of the sources when not given")
    image_size: Pixels = Field(224, description="side of a view in pixels")
    batch_size: BatchSize = Field(
        64,
        description="images per optimizer step, over all processes and accumulated parts; auto: see global_batch_size",
    )
    global_batch_size: Positive | None = Field(
        None,
        description="under batch_size: auto, images per optimizer step (256 when not given), in as few accumulated "
        "parts as fit into memory",
    )
    num_views: Annotated[Int, Field(ge=1, le=8)] = Field(1, description="augmented views of each image in a step")
    max_bad_fraction: Unit = Field(
        0.01, description="share of a source's files that may be unreadable; they are replaced by others of the source"
    )
    num_workers: Few = Field(0, description="loader processes; 0 loads in the training process")
    timeout: Weight = Field(
        600.0, description="seconds without a batch from loader processes before the run is stopped; 0 waits forever"
    )
    pin_memory: Bool = Field(True, description="page-locked batches where the device is cuda")
    decode_size: Pixels | None = Field(
        None, description="side at which images of varying size are kept; image_size * 8/7 when not given"
    )
    cache_gb: Weight = Field(2.0, description="sources that fit in this much memory are decoded once and kept")
    augmentation: Augmentation = Augmentation()
    multicrop: Multicrop = Multicrop()

    @property
    def images_per_step(self) -> int:
        """`batch_size` as a number; `auto` has been settled before anybody asks."""
        assert isinstance(self.batch_size, int), "data.batch_size: auto was not settled"
        return self.batch_size

    def local_size(self, patch_size: int) -> int:
        """Side of a local crop in pixels."""
        patches = max(1, round(self.image_size * 3 / 7 / patch_size))
        return self.multicrop.local_crop_size or patches * patch_size

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        if self.global_batch_size is not None and self.batch_size != "auto":
            yield Conflict(
                ("global_batch_size", "batch_size"),
                "is for data.batch_size=auto; set data.global_batch_size=null, or data.batch_size=auto",
            )

    @model_validator(mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        # `data: ./photos` is a whole config.
        return folder_section(value) if isinstance(value, str) else value
