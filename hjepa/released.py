"""Start from weights that are on the disk: timm's, I-JEPA's as it was released, or those of a run of ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from hjepa.errors import ConfigError, first_line
from hjepa.model.backbone import Backbone
from hjepa.model.hjepa import HJEPA
from hjepa.weights import find_weights

# By this weight a transformer is found, whatever it was wrapped in; the first of these names that holds one counts.
_PATCHES = "patch_embed.proj.weight"
_WRAPPERS = ("target_encoder.", "average_encoder.", "encoder.", "context_encoder.", "")
# What a classifier has and an encoder of patches lacks.
_LEFT_BEHIND = ("head.", "head_dist.", "fc_norm.", "cls_token", "dist_token", "mask_token")


def start_from(model: HJEPA, path: str | Path) -> None:
    """Give the encoders of a new model the weights of a file, or of a run.

    A class token and a classifier are left behind, filters of patches and positions are resampled to the model's patch
    size and grid. Of an I-JEPA checkpoint (Assran et al. 2023, as released) and of a run the target encoder is taken.

    Args:
        model: as it was built.
        path: `.safetensors`, or a file of torch's (`.pth`, `.pt`, `.bin`, `.tar`), which is read without executing
            anything in it; or the folder of a run or of a checkpoint.

    Raises:
        ConfigError: when there is no such file, none of a transformer, or one of another shape.
        StorageError: when a checkpoint of ours is damaged.
    """
    path = Path(path).expanduser()
    backbone = model.context_encoder.backbone
    given = _fitted(_transformer(_read(path), path), backbone)
    wanted = backbone.vit.state_dict()
    for name in sorted(wanted.keys() | given.keys()):
        here, there = (tuple(state[name].shape) if name in state else None for state in (wanted, given))
        if here != there:
            said = [f"of shape {list(shape)}" if shape is not None else "missing" for shape in (there, here)]
            raise ConfigError(
                f"model.pretrained: {path}: another encoder's weights: {name} is {said[0]} there and {said[1]} in this "
                "model; set the model's shape and options to those of the file"
            )
    backbone.vit.load_state_dict(given)
    if model.slow_encoder is not None:
        model.slow_encoder.copy_from_context_encoder(model.context_encoder)


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, those in nested dictionaries by dotted ones."""
    if path.is_dir():
        return find_weights(path, warnings.warn).weights
    if not path.is_file():
        raise ConfigError(f"model.pretrained: {path}: no such file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return _flat(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file can fail in any way
        reason = first_line(error)
        raise ConfigError(f"model.pretrained: {path}: no file of weights ({reason})") from None


def _flat(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, dict):
        return {}
    parts = [_flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()]
    return {key: tensor for part in parts for key, tensor in part.items()}


def _transformer(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The part of a file that is a vision transformer, by timm's names (I-JEPA's are the same)."""
    prefixes = [key.removesuffix(_PATCHES) for key in state if key.endswith(_PATCHES)]
    for wrapper in _WRAPPERS:
        for prefix in prefixes:
            if prefix.startswith(wrapper):
                found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                return {key: value.float() for key, value in found.items()}
    raise ConfigError(f"model.pretrained: {path}: holds no vision transformer with timm's names ({_PATCHES})")


def _fitted(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The weights without what the backbone lacks, patches and positions in its own size."""
    prefix_tokens = sum(name in state for name in ("cls_token", "dist_token"))
    if "norm.weight" not in state and "fc_norm.weight" in state:
        # timm calls the last norm so in classifiers that pool by the mean.
        state |= {f"norm.{part}": state[f"fc_norm.{part}"] for part in ("weight", "bias")}
    fitted = {name: value for name, value in state.items() if not name.startswith(_LEFT_BEHIND)}
    if "pos_embed" in fitted:
        positions = fitted["pos_embed"].reshape(1, -1, fitted["pos_embed"].shape[-1])
        side = round((positions.shape[1] - prefix_tokens) ** 0.5)
        if side**2 + prefix_tokens == positions.shape[1]:
            positions = positions[:, prefix_tokens:]
        size = [backbone.grid.height, backbone.grid.width]
        fitted["pos_embed"] = resample_abs_pos_embed(positions, size, num_prefix_tokens=0)
    patch = list(backbone.vit.patch_embed.patch_size)
    if fitted[_PATCHES].ndim == 4 and list(fitted[_PATCHES].shape[2:]) != patch:
        fitted[_PATCHES] = resample_patch_embed(fitted[_PATCHES], patch)
    return fitted
