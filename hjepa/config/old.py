"""The settings of the first H-JEPA project's configs, as several of them say one thing together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hjepa.config.legacy import DATASET_SIZES, LOSS_TYPES
from hjepa.config.schema import Config
from hjepa.config.walk import general

PREDICTIONS = ("mse", "smoothl1")
"""Losses without a regulariser."""


def plain(key: str) -> str:
    """A key without the indexes of lists, as the tables have it."""
    return re.sub(r"\[\d+\]", "", key)


class Old:
    """The settings of an old config, and what follows from several of them.

    Attributes:
        is_old: whether any key is of the old vocabulary alone. Some keys that both vocabularies have meant something
            else there, and nothing but the keys beside them tells which is meant.
    """

    def __init__(self, settings: Mapping[str, Any], is_old: bool) -> None:
        """Take leaf keys (lists of sections by index) with their values."""
        self._values = settings
        self.is_old = is_old

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting."""
        return self._values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether a setting is stated; its value may be null."""
        return key in self._values

    def number(self, key: str, default: float) -> float:
        """The value of a setting as a number (ValueError, TypeError if it is none)."""
        value = self._values.get(key)
        return default if value is None else float(value)

    @property
    def uses_list(self) -> bool:
        """Whether `data.datasets` says what is trained on, rather than `data.dataset`."""
        listed = any(key.startswith("data.datasets[") for key in self._values)
        return listed and (self.get("data.use_multi_dataset") is True or not self.has("data.dataset"))

    @property
    def loss_type(self) -> str | None:
        """The loss that was meant, in the new vocabulary; None where nothing is said."""
        stated = self.get("loss.type") or self.get("loss.prediction_loss_type") or self.get("loss.jepa_loss_type")
        kind = LOSS_TYPES.get(str(stated), str(stated)) if stated else None
        if kind in (None, *PREDICTIONS):
            if self.get("loss.use_vicreg") is True:
                return "combined"
            if self.get("loss.use_sigreg") is True:
                return "sigreg"
        return "smoothl1" if kind is None and self.get("loss.use_smoothl1") is True else kind

    @property
    def probes_off(self) -> bool:
        """Whether k-NN and the linear probe are both switched off."""
        knn = ("evaluation.eval_knn", "evaluation.knn.enabled")
        linear = ("evaluation.eval_linear_probe", "evaluation.linear_probe.enabled", "evaluation.linear")
        return all(any(self.get(key) is False for key in keys) for keys in (knn, linear))

    @property
    def no_local_crops(self) -> str | None:
        """The key that switches local crops off, if any does."""
        switches = ("data.use_multicrop", "data.multi_crop.enabled")
        stated = [key for key in switches if self.has(key)]
        return stated[0] if stated and not any(self.get(key) for key in stated) else None

    @property
    def epochs(self) -> float:
        """Length of the run."""
        return self.number("training.epochs", Config().training.epochs or 1)

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps per epoch; None where the number of images is not known from the config alone."""
        names = [self.get("data.dataset")]
        if self.uses_list:
            names = [value for key, value in self._values.items() if general(key) == "data.datasets[].name"]
        sizes = [DATASET_SIZES.get(str(name).lower()) for name in names]
        batch = self.number("data.batch_size", 64) * self.number("training.accumulation_steps", 1)
        known = [size for size in sizes if size is not None]
        return sum(known) / batch if len(known) == len(sizes) and batch > 0 else None
