"""The encoder of a run as a transformer in scikit-learn's sense: `fit`, `transform`, and a place in a Pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa.device import choose
from hjepa.errors import ConfigError
from hjepa.use.frozen import Encoder, OneImage, load

_BLANK = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
_PARAMETERS = ("run", "online", "level", "batch_size", "device")


class HJEPAEmbedder:
    """Images to embeddings, by scikit-learn's conventions; scikit-learn itself is not needed.

    `make_pipeline(HJEPAEmbedder("runs/x"), StandardScaler(), LogisticRegression())` classifies images. The encoder was
    trained already, so that `fit` only loads it.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] = "",
        online: bool = False,
        level: int | None = None,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        """Nothing is read or checked before `fit`, as scikit-learn wants it.

        Args:
            run: folder of a run or of a checkpoint, see `hjepa.load`.
            online: the context encoder in place of its slow average.
            level: the mean of this level's features in place of the pooled tokens.
            batch_size: images per forward pass.
            device: cpu, cuda, mps, or auto for the best there is.
        """
        self.run, self.online, self.level, self.batch_size, self.device = run, online, level, batch_size, device

    def fit(self, X: Any = None, y: Any = None) -> HJEPAEmbedder:
        """Load the encoder; X and y are not looked at.

        Raises:
            ConfigError: when there is no run, no such device or level, or the batch is no positive number.
            StorageError: when the run has no intact checkpoint.
        """
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: must be at least 1")
        encoder = load(self.run, self.online)
        if self.level is not None and not 0 <= self.level < encoder.num_levels:
            raise ConfigError(f"level={self.level}: {self.run} has the levels 0 to {encoder.num_levels - 1}")
        self.encoder_: Encoder = encoder.to(choose(self.device).name)
        return self

    def transform(self, X: Sequence[OneImage] | Tensor | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed images.

        Args:
            X: PIL images or paths (a list or an array of them), or uint8 `[n, 3, H, W]` as tensor or array, or
                floating point `[n, 3, S, S]` as a tensor, normalised.

        Returns:
            `[n, D]` float32, or `[n, T_l D]` of a level.

        Raises:
            ConfigError: before `fit`.
            DataError: for images that cannot be read, by path.
        """
        parts = [self._embed(part) for part in self._batches(X)]
        return np.concatenate(parts) if parts else self._embed(_BLANK)[:0]

    def fit_transform(self, X: Any, y: Any = None) -> NDArray[np.float32]:
        """`fit` and `transform` of the same images."""
        return self.fit(X, y).transform(X)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns that `transform` gives."""
        width = self._embed(_BLANK).shape[1]
        kind = "pooled" if self.level is None else f"level{self.level}"
        return np.asarray([f"hjepa_{kind}_{column}" for column in range(width)], dtype=object)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments it was made with."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> HJEPAEmbedder:
        """Change some of them; `fit` again before they count.

        Raises:
            ValueError: for a name that is none of them, as scikit-learn has it.
        """
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise ValueError(f"HJEPAEmbedder has no parameter {name!r}; it has {', '.join(_PARAMETERS)}")
            setattr(self, name, value)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """As it is, the encoder on the CPU: whoever reads it may have no such device."""
        state = vars(self).copy()
        if self.__sklearn_is_fitted__():
            state["encoder_"] = deepcopy(self.encoder_).cpu()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The encoder goes to the device that was asked for.

        Raises:
            ConfigError: when it was asked for by name and is not there.
        """
        vars(self).update(state)
        if self.__sklearn_is_fitted__():
            self.encoder_.to(choose(self.device).name)

    def _batches(self, images: Any) -> Iterator[Any]:
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.ascontiguousarray(images)) if images.dtype == np.uint8 else images.tolist()
        for start in range(0, len(images), self.batch_size):
            yield images[start : start + self.batch_size]

    def _embed(self, images: Any) -> NDArray[np.float32]:
        if not self.__sklearn_is_fitted__():
            raise ConfigError("HJEPAEmbedder: call fit first")
        out: NDArray[np.float32] = self.encoder_(images).rows(self.level).mean(dim=1).float().cpu().numpy()
        return out

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "encoder_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags  # only scikit-learn asks

        return Tags(
            estimator_type="transformer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(),
            input_tags=InputTags(two_d_array=False, string=True),
            requires_fit=True,
        )

    def __repr__(self) -> str:
        return f"HJEPAEmbedder({', '.join(f'{name}={getattr(self, name)!r}' for name in _PARAMETERS)})"
