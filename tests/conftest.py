"""What the tests share: a small run that trains in a second, and one thread, as many tests run side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)

SMALL = (
    "model.encoder_type=vit",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=3",
    "model.num_heads=2",
    "model.predictor.depth=1",
    "model.predictor.embed_dim=16",
    "model.projector.hidden_dim=16",
    "model.projector.output_dim=8",
    "data.datasets=[{name: shapes, length: 64}]",
    "data.image_size=64",
    "data.batch_size=8",
    "training.epochs=4",
    "evaluation.max_train=48",
    "evaluation.max_test=32",
    "logging.use_tensorboard=false",
    "logging.use_report=false",
    "logging.log_frequency=1",
    "device=cpu",
)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's own cache, by processes that tests start neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def small() -> tuple[str, ...]:
    """Overrides of a run on `shapes` with 8 steps per epoch and 4 epochs."""
    return SMALL


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps whose slow average is another encoder; checkpoints of steps 2 and 3. Not to be changed."""
    from hjepa.config import load_config
    from hjepa.train import train

    path = tmp_path_factory.mktemp("runs") / "x"
    settings = ("training.max_steps=3", "training.lr=0.01", "checkpoint.save_frequency_steps=2")
    train(load_config(None, (*SMALL, *settings, f"experiment.output_dir={path}")))
    return path


@pytest.fixture
def recipes() -> list[Path]:
    """The shipped configs."""
    return sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
