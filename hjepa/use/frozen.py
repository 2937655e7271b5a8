"""The encoder of a finished run as a module of its own, with all that has to be done to an image before it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from hjepa.checkpoint import WEIGHTS
from hjepa.config.data import Data
from hjepa.config.model import Model
from hjepa.data.decode import decode, decode_image
from hjepa.data.source import Float32, UInt8
from hjepa.data.sources import decode_side
from hjepa.data.views import center_views, plain_views
from hjepa.errors import DataError, StorageError
from hjepa.grid import Grid
from hjepa.model.backbone import Backbone, build_backbone
from hjepa.model.pyramid import level_targets, spread_taps
from hjepa.weights import Weights, find_weights

OneImage: TypeAlias = Image.Image | str | os.PathLike[str]
Images: TypeAlias = Tensor | OneImage | Sequence[OneImage]

_ENCODERS = ("target_encoder", "average_encoder", "context_encoder")


class Features(NamedTuple):
    """What the encoder makes of a batch.

    Attributes:
        tokens: `[B, N, D]` float32, one token per patch, row by row, after the final norm.
        pooled: `[B, D]` float32, their mean: the embedding that the run's probes judge.
        levels: for each level l `[B, h_l, w_l, T_l D]` float32, what the predictor was asked for: the level's taps,
            layer-normalised, averaged over cells of 2^l x 2^l patches and normalised again.
    """

    tokens: Tensor
    pooled: Tensor
    levels: tuple[Tensor, ...]

    def rows(self, level: int | None) -> Tensor:
        """The final tokens `[B, N, D]` or, of a level, its cells `[B, h_l w_l, T_l D]`."""
        return self.tokens if level is None else self.levels[level].flatten(1, 2)


@dataclass(frozen=True)
class Origin:
    """Where an encoder comes from.

    Attributes:
        checkpoint: absolute path of the checkpoint's folder.
        sha256: of its file of weights.
        step: optimizer steps done.
        run: its name.
        online: whether it is the context encoder where there is a slow average of it.
    """

    checkpoint: str
    sha256: str
    step: int
    run: str
    online: bool


class Preprocess(nn.Module):
    """The largest centred square of an image, at the size and in the range that the encoder was trained with.

    Files and PIL images are turned upright and squeezed to `side` x `side` pixels first, as the run keeps them.

    Attributes:
        image_size: side S of what comes out, in pixels.
        mean, std: of the channels, in the range 0..1.
        side: at which files are kept, in pixels.
    """

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.image_size = data.image_size
        self.mean, self.std = data.augmentation.mean, data.augmentation.std
        self.side = decode_side(data)
        self.views = plain_views(data.augmentation, data.image_size)

    def forward(self, images: Images) -> Tensor:
        """Images to what the encoder takes.

        Args:
            images: uint8 `[B, 3, H, W]` RGB; or PIL images, or paths of image files, several or one.

        Returns:
            `[B, 3, S, S]` float32, normalised, on the device of this module.

        Raises:
            DataError: for a tensor of another type or shape, or an empty list.
            ImageError: for a file that cannot be read (a DataError with its path).
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise DataError(f"images: expected a uint8 tensor [B, 3, H, W], got {_described(images)}")
            sizes = np.broadcast_to(np.asarray(images.shape[2:], np.float32), (len(images), 2))
            return self.squares(images, sizes)
        several = [images] if isinstance(images, Image.Image | str | os.PathLike) else list(images)
        if not several:
            raise DataError("images: none were given")
        found = [self._read(image, number) for number, image in enumerate(several)]
        squeezed = torch.from_numpy(np.stack([pixels for pixels, _ in found]))
        return self.squares(squeezed, np.asarray([size for _, size in found], np.float32))

    def squares(self, images: Tensor, true_sizes: Float32) -> Tensor:
        """uint8 `[B, 3, H, W]` and their `[B, 2]` true height and width -> `[B, 3, S, S]` float32, normalised."""
        device = self.views.scale.device
        out: Tensor = self.views(images.to(device), center_views(true_sizes).to(device))
        return out

    def _read(self, image: OneImage, number: int) -> tuple[UInt8, tuple[int, int]]:
        if isinstance(image, Image.Image):
            return decode_image(image, self.side, f"number {number}")
        if not isinstance(image, str | os.PathLike):
            raise DataError(
                f"images: number {number} is a {type(image).__name__}; expected PIL images, paths, or one tensor"
            )
        return decode(image, self.side)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"image_size={self.image_size}, mean={self.mean}, std={self.std}"


class Encoder(nn.Module):
    """A frozen encoder: images in, features out. Made by `load`; in eval mode and without gradients.

    Attributes:
        preprocess: from images to what the encoder takes.
        backbone: the timm transformer inside its adapter.
        origin: where it comes from.
        model, data: the sections of the run's config.
    """

    def __init__(self, backbone: Backbone, model: Model, data: Data, origin: Origin) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocess = Preprocess(data)
        self.model, self.data, self.origin = model, data, origin
        self.num_levels = model.num_hierarchies
        self.taps = tuple(model.target_layers or spread_taps(model.shape.depth))
        self.requires_grad_(False)
        self.eval()

    @property
    def embed_dim(self) -> int:
        """Width D of a token and of the pooled embedding."""
        return self.backbone.embed_dim

    @property
    def grid(self) -> Grid:
        """The patches of an image; `grid.height * grid.width` is N."""
        return self.backbone.grid

    @property
    def image_size(self) -> int:
        """Side S of the images that it takes, in pixels."""
        return self.preprocess.image_size

    def forward(self, images: Images) -> Features:
        """Encode images; one is a batch of one.

        Args:
            images: floating point `[B, 3, S, S]` that is normalised already; uint8 `[B, 3, H, W]` RGB of any size; or
                PIL images, or paths of image files.

        Raises:
            DataError: for a tensor of another type or shape, an empty list, or a file that cannot be read.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
                wanted = f"[B, 3, {self.image_size}, {self.image_size}]"
                raise DataError(
                    f"images: normalised ones are {wanted}, got {_described(images)}; "
                    "encoder.preprocess makes them of uint8 tensors, PIL images and paths of any size"
                )
            inputs = images
        else:
            inputs = self.preprocess(images)
        weight = self.backbone.vit.patch_embed.proj.weight  # says on which device, and in which precision
        encoded = self.backbone(inputs.to(weight), taps=self.taps)
        maps = torch.stack(encoded.taps, dim=2).unflatten(1, (self.grid.height, self.grid.width))
        levels = tuple(level.flatten(-2) for level in level_targets(maps, self.num_levels))
        return Features(encoded.tokens, encoded.tokens.mean(dim=1), levels)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"embed_dim={self.embed_dim}, grid={self.grid.height}x{self.grid.width}, step={self.origin.step}"


def load(run: str | os.PathLike[str], online: bool = False, warn: Callable[[str], None] = warnings.warn) -> Encoder:
    """The encoder of a run, on the CPU.

    Args:
        run: a run's folder (its newest intact checkpoint), or a checkpoint's, which may have been copied or renamed;
            `model.safetensors` and `manifest.json` are all that is needed of it.
        online: the context encoder itself in place of its slow average, where the run has one.
        warn: is told of checkpoints that are damaged and were passed over.

    Raises:
        ConfigError: when there is no checkpoint.
        StorageError: when none is intact.
    """
    return encoder_of(find_weights(Path(run), warn), online)


def encoder_of(saved: Weights, online: bool = False) -> Encoder:
    """The encoder of a checkpoint that has been read; see `load`."""
    try:
        model, data = Model.model_validate(saved.config["model"]), Data.model_validate(saved.config["data"])
    except (KeyError, ValidationError) as error:
        raise StorageError(f"{saved.path}: its config is of another version of hjepa ({error})") from None
    prefixes = [f"{name}.backbone." for name in _ENCODERS]
    there = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in saved.weights)]
    if not there:
        raise StorageError(f"{saved.path}: no encoder in its {WEIGHTS}")
    prefix = there[-1] if online else there[0]
    state = {key.removeprefix(prefix): value for key, value in saved.weights.items() if key.startswith(prefix)}
    # What released weights it started from does not matter any more, and nobody else's random numbers are used up.
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(model.model_copy(update={"pretrained": False}), data.image_size)
    backbone.load_state_dict(state)
    name = saved.config["experiment"]["name"]
    is_online = online and len(there) > 1
    return Encoder(backbone, model, data, Origin(str(saved.path.absolute()), saved.sha256, saved.step, name, is_online))


def untrained_of(saved: Weights) -> Encoder:
    """The encoder of a checkpoint's run with the random weights of its seed, for its training to be held against."""
    encoder = encoder_of(saved)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(saved.config["experiment"]["seed"])
        fresh = build_backbone(encoder.model.model_copy(update={"pretrained": False}), encoder.data.image_size)
    encoder.backbone.load_state_dict(fresh.state_dict())
    return encoder


def _described(images: Tensor) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
