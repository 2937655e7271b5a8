"""Hierarchical Joint-Embedding Predictive Architecture: self-supervised image pretraining.

The names below are imported when they are first used, so that `import hjepa` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hjepa.build import create_hjepa_from_config
    from hjepa.config import Config, load_config
    from hjepa.evaluate import evaluate_run as evaluate
    from hjepa.model.encoder import create_encoder
    from hjepa.model.predictor import create_predictor
    from hjepa.train import train
    from hjepa.use.embedder import HJEPAEmbedder
    from hjepa.use.frozen import load

__all__ = [
    "Config",
    "HJEPAEmbedder",
    "create_encoder",
    "create_hjepa_from_config",
    "create_predictor",
    "evaluate",
    "load",
    "load_config",
    "train",
]

# Modules that can be called, see `facade`.
_CALLABLE = ("evaluate", "train")

_HOME = {
    "Config": "hjepa.config",
    "HJEPAEmbedder": "hjepa.use.embedder",
    "create_encoder": "hjepa.model.encoder",
    "create_hjepa_from_config": "hjepa.build",
    "create_predictor": "hjepa.model.predictor",
    "load": "hjepa.use.frozen",
    "load_config": "hjepa.config",
}


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"hjepa.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'hjepa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
