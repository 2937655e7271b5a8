"""What is probed: the trained encoder in both of its forms, and what costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.assess.request import FEATURES
from hjepa.build import create_hjepa_from_config
from hjepa.config import Config
from hjepa.errors import ConfigError, StorageError
from hjepa.evaluate import Arithmetic, arithmetic_of, at_start, untrained
from hjepa.evaluation.dense import patch_pixels
from hjepa.evaluation.features import pixel_features
from hjepa.model.backbone import Backbone
from hjepa.model.hjepa import HJEPA
from hjepa.weights import Weights

TITLES = {
    "": "trained encoder",
    "online": "without averaging (online)",
    "pixels": "raw pixels",
    "random": "untrained encoder",
    "start": "at the start (pretrained)",
}


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features.

    Attributes:
        name: a key of `TITLES`, and how its figures end: `knn_random`.
        maps: `[b, 3, S, S]` normalised -> `[b, h, w, d]` float32 of every feature by name, "last" first.
        pooled: the same -> `[b, d]` float32.
        backbone: the transformer, where it is one.
    """

    name: str
    maps: Callable[[Tensor], dict[str, Tensor]]
    pooled: Callable[[Tensor], dict[str, Tensor]]
    backbone: Backbone | None = None


def feature_names(config: Config, features: Sequence[str]) -> list[str]:
    """Which of a model's features are meant: `level0` is the taps side by side, so both words mean it.

    Raises:
        ConfigError: for the FPN of a run that has none.
    """
    refined = config.model.fpn.use_fpn and config.loss.predicts
    if "fpn" in features and not refined and set(features) != set(FEATURES):  # all: those that there are
        raise ConfigError("--features fpn: the run has no feature pyramid (model.fpn.use_fpn); leave it out")
    levels = [f"level{level}" for level in range(config.model.num_hierarchies)]
    names = ["last", *(levels if "levels" in features else levels[:1] if "taps" in features else [])]
    return [*names[0 if "last" in features else 1 :], *(["fpn"] if "fpn" in features and refined else [])]


def build_subjects(
    config: Config, saved: Weights, names: Sequence[str], encoder: str, device: torch.device
) -> list[Subject]:
    """The encoders of a checkpoint, raw pixels, and the encoder untrained and as it was before its first step.

    Args:
        config: of the run.
        saved: the checkpoint.
        names: see `feature_names`.
        encoder: target, online or both; a run without a slow average has one encoder, whatever it is called.
        device: where they compute.

    Raises:
        StorageError: when the weights are not those of the config's model.
    """
    model = create_hjepa_from_config(config, continued=True)
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError:
        raise StorageError(f"{saved.path}: its weights are not of the model that its config describes") from None
    model.to(device)
    arithmetic = arithmetic_of(config, device)
    slow = model.slow_encoder
    subjects = []
    if encoder != "online" or slow is None:
        subjects.append(_subject("", model, names, arithmetic, online=slow is None))
    if encoder != "target" and slow is not None:
        subjects.append(_subject("online", model, names, arithmetic, online=True))
    subjects.append(_pixels(model))
    subjects.append(_subject("random", untrained(config).to(device), names, arithmetic, online=True))
    start = at_start(config)
    if start is not None:
        subjects.append(_subject("start", start.to(device), names, arithmetic, online=True))
    return subjects


def _subject(name: str, model: HJEPA, names: Sequence[str], arithmetic: Arithmetic, online: bool) -> Subject:
    model.eval()

    def maps(images: Tensor) -> dict[str, Tensor]:
        with arithmetic():
            found = model.maps(images, online)
        return {feature: found[feature].float() for feature in names}

    def pooled(images: Tensor) -> dict[str, Tensor]:
        return {feature: rows.mean(dim=(1, 2)) for feature, rows in maps(images).items()}

    encoder = model.context_encoder if online or model.slow_encoder is None else model.slow_encoder
    return Subject(name, maps, pooled, encoder.backbone)


def _pixels(model: HJEPA) -> Subject:
    grid = model.grid

    def maps(images: Tensor) -> dict[str, Tensor]:
        return {"last": patch_pixels(images, grid).unflatten(1, (grid.height, grid.width))}

    return Subject("pixels", maps, lambda images: {"last": pixel_features(images)})


def title(subject: str, feature: str) -> str:
    """What a row of figures is of."""
    named = {"fpn": "feature pyramid", "level0": "level 0 (taps)"}
    what = named.get(feature, feature.replace("level", "level "))
    return TITLES[subject] if feature == "last" else f"{TITLES[subject]}, {what}"


def suffix(subject: str, feature: str) -> str:
    """How a figure's name ends: nothing for the trained encoder's last layer."""
    parts = [subject] if subject else []
    return "".join(f"_{part}" for part in (*parts, *([] if feature == "last" else [feature])))
