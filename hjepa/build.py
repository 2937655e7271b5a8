"""From a config to the model it describes."""

from __future__ import annotations

from pathlib import Path

import torch

from hjepa.config import Config, load_config
from hjepa.grid import Grid
from hjepa.model.hjepa import HJEPA


def create_hjepa_from_config(config: Config | str | Path) -> HJEPA:
    """The model that a config (or its file) describes, with the weights of its seed.

    Raises:
        ConfigError: when the config is refused.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    torch.manual_seed(config.experiment.seed)
    loss = config.loss
    model = HJEPA(config.model, grid_of(config), loss.has_image_level, loss.predicts, loss.predict_every)
    model.set_gradient_checkpointing(config.training.use_gradient_checkpointing)
    return model


def grid_of(config: Config) -> Grid:
    """The patches of one view."""
    return Grid.of(config.data.image_size, config.model.shape.patch_size)


def run_path(config: Config) -> Path:
    """Where the run is kept."""
    return Path(config.experiment.output_dir or f"runs/{config.experiment.name}")
