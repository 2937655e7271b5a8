"""Settings that do not go together, mended where there is one obvious way; for `hjepa migrate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from hjepa.config.geometry import ENCODERS, OWN_SHAPE, EncoderShape, encoder_shape, nearest_divisor, nearest_masking
from hjepa.config.walk import leaves

_DEFAULTS = {leaf.key: leaf.default for leaf in leaves()}
_SHAPE = ("patch_size", "embed_dim", "depth", "num_heads")


class Repair(NamedTuple):
    """What makes settings go together.

    Attributes:
        settings: new values.
        note: what was wrong.
    """

    settings: dict[str, Any]
    note: str


def repair(keys: tuple[str, ...], settings: dict[str, Any]) -> Repair | None:
    """The obvious way out of a conflict.

    Args:
        keys: dotted names of the settings that do not go together, as the conflict names them.
        settings: what is stated, by dotted name; each value is one that its setting takes.

    Returns:
        None where there is no obvious way.
    """
    function = _REPAIRS.get(keys[:2])
    return None if function is None else function(settings, keys[0])


def _get(settings: dict[str, Any], key: str) -> Any:
    return settings.get(key, _DEFAULTS[key])


def _shape(settings: dict[str, Any]) -> EncoderShape:
    return encoder_shape(_get(settings, "model.encoder_type"), *(_get(settings, f"model.{part}") for part in _SHAPE))


def _warmup(settings: dict[str, Any], key: str) -> Repair:
    epochs = _get(settings, "training.epochs")
    return Repair({key: float(epochs - 1)}, f"{float(settings[key]):g} leaves nothing of {epochs} epochs")


def _end_of_lr(settings: dict[str, Any], key: str) -> Repair:
    lr = float(_get(settings, "training.lr"))
    return Repair({key: lr}, f"{float(_get(settings, key)):g} is above training.lr")


def _hierarchy_weights(settings: dict[str, Any], key: str) -> Repair | None:
    weights = [float(weight) for weight in settings[key]]
    if "model.num_hierarchies" not in settings and 1 <= len(weights) <= 4:
        return Repair({"model.num_hierarchies": len(weights)}, f"model.num_hierarchies: {len(weights)}, one per weight")
    levels = _get(settings, "model.num_hierarchies")
    note = f"{len(weights)} weights for {levels} level(s)"
    if len(weights) > levels:
        return Repair({key: weights[:levels]}, f"{note}; the first stay")
    if not weights:
        return None
    while len(weights) < levels:
        weights.append(weights[-1] / 2)
    return Repair({key: weights}, f"{note}; each level more weighs half, as by default")


def _own_shape(settings: dict[str, Any], key: str) -> Repair | None:
    if settings.get("model.pretrained"):
        return None
    name, shape = _get(settings, "model.encoder_type"), _shape(settings)
    heads = shape.num_heads if settings.get("model.num_heads") else nearest_divisor(shape.embed_dim, shape.num_heads)
    changes = {
        "model.encoder_type": OWN_SHAPE,
        "model.patch_size": shape.patch_size,
        "model.embed_dim": shape.embed_dim,
        "model.depth": shape.depth,
        "model.num_heads": heads,
    }
    part = key.removeprefix("model.")
    values = f"patch_size {shape.patch_size}, embed_dim {shape.embed_dim}, depth {shape.depth}, num_heads {heads}"
    note = f"{settings[key]} is not {name}'s {part} {getattr(ENCODERS[name], part)}; encoder_type: vit with {values}"
    return Repair(changes, note)


def _predictor_heads(settings: dict[str, Any], key: str) -> Repair:
    width = _get(settings, "model.predictor.embed_dim") or _shape(settings).embed_dim // 2
    return Repair({key: nearest_divisor(width, settings[key])}, f"{settings[key]} does not divide the width {width}")


def _local_crops(settings: dict[str, Any], key: str) -> Repair:
    kind = _get(settings, "loss.type")
    return Repair({key: 0}, f"nothing compares views under loss.type: {kind}; for local crops set loss.type: sigreg")


def _masking(settings: dict[str, Any], key: str) -> Repair | None:
    patch = _shape(settings).patch_size
    side, levels = _get(settings, "data.image_size") // patch, _get(settings, "model.num_hierarchies")
    scale, ratio = (
        (float(low), float(high))
        for low, high in (_get(settings, "masking.mask_scale"), _get(settings, "masking.aspect_ratio"))
    )
    num_masks = _get(settings, "masking.num_masks")
    overrides = [
        part.partition("=") for part in nearest_masking(side, side, num_masks, scale, ratio, 2 ** (levels - 1)).split()
    ]
    if not all(name in _DEFAULTS for name, _, _ in overrides):
        return None
    changes = {name: yaml.safe_load(value) for name, _, value in overrides}
    shown = ", ".join(f"{name}: {value}" for name, value in changes.items())
    return Repair(changes, f"no such block on a {side} x {side} grid with {levels} level(s); {shown} is nearest")


_REPAIRS: dict[tuple[str, ...], Callable[[dict[str, Any], str], Repair | None]] = {
    ("training.warmup_epochs", "training.epochs"): _warmup,
    ("training.min_lr", "training.lr"): _end_of_lr,
    ("training.warmup_lr", "training.lr"): _end_of_lr,
    ("loss.hierarchy_weights", "model.num_hierarchies"): _hierarchy_weights,
    ("model.embed_dim", "model.encoder_type"): _own_shape,
    ("model.depth", "model.encoder_type"): _own_shape,
    ("model.num_heads", "model.encoder_type"): _own_shape,
    ("model.predictor.num_heads", "model.predictor.embed_dim"): _predictor_heads,
    ("data.multicrop.num_local_crops", "loss.type"): _local_crops,
    ("masking.mask_scale", "masking.num_masks"): _masking,
}
