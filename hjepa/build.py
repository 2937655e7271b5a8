"""From a config to the model it describes."""

from __future__ import annotations

from pathlib import Path

import torch

from hjepa.config import Config, load_config
from hjepa.grid import Grid
from hjepa.model.hjepa import HJEPA
from hjepa.released import start_from


def create_hjepa_from_config(config: Config | str | Path, continued: bool = False) -> HJEPA:
    """The model that a config (or its file) describes, with the weights of its seed or of `model.pretrained`.

    Args:
        config: the whole of a run.
        continued: other weights will take the place of these, so that no file of them is read.

    Raises:
        ConfigError: when the config is refused.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    torch.manual_seed(config.experiment.seed)
    loss, source = config.loss, config.model.pretrained
    settings = config.model.model_copy(update={"pretrained": False}) if continued else config.model
    model = HJEPA(settings, grid_of(config), loss.has_image_level, loss.predicts, loss.predict_every)
    model.set_gradient_checkpointing(config.training.use_gradient_checkpointing)
    if isinstance(source, str) and not continued:
        start_from(model, source)
    return model


def grid_of(config: Config) -> Grid:
    """The patches of one view."""
    return Grid.of(config.data.image_size, config.model.shape.patch_size)


def run_path(config: Config) -> Path:
    """Where the run is kept."""
    return Path(config.experiment.output_dir or f"runs/{config.experiment.name}")
