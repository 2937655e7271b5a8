"""Hierarchical Joint-Embedding Predictive Architecture: self-supervised image pretraining.

The names below are imported when they are first used, so that `import hjepa` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hjepa.build import create_hjepa_from_config
    from hjepa.config import Config, load_config
    from hjepa.model.encoder import create_encoder
    from hjepa.model.predictor import create_predictor

__all__ = ["Config", "create_encoder", "create_hjepa_from_config", "create_predictor", "load_config"]

_HOME = {
    "Config": "hjepa.config",
    "create_encoder": "hjepa.model.encoder",
    "create_hjepa_from_config": "hjepa.build",
    "create_predictor": "hjepa.model.predictor",
    "load_config": "hjepa.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hjepa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
