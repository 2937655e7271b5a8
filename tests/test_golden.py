"""What a release computed, later ones compute: to rounding, as other processors sum in another order.

All of it is rewritten by one command, after a change that is meant to change it:

    REWRITE_GOLDEN=1 python -m pytest tests/test_golden.py
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hjepa import checkpoint
from hjepa.config import load_config
from hjepa.evaluate import evaluate_run
from hjepa.train import train

GOLDEN = Path(__file__).parent / "golden"
ROUNDING = 2e-4
REWRITE = bool(os.environ.get("REWRITE_GOLDEN"))

OBJECTIVES = {
    "mse": ("loss.type=mse",),
    "smoothl1": ("loss.type=smoothl1",),
    "combined": ("loss.type=combined",),
    "sigreg": ("loss.type=sigreg",),
    "image_level": ("loss.type=sigreg", "loss.hierarchy_weights=[0,0]", "masking.num_masks=0"),
}

# Small, since the checkpoint is committed: weights, their average and AdamW's moments in less than 100 kB.
TINY = (
    "experiment.name=golden",
    "model.encoder_type=vit",
    "model.patch_size=4",
    "model.embed_dim=8",
    "model.depth=1",
    "model.num_heads=2",
    "model.num_hierarchies=1",
    "model.predictor.depth=1",
    "model.predictor.embed_dim=8",
    "model.projector.hidden_dim=8",
    "model.projector.output_dim=4",
    "loss.type=sigreg",
    "loss.sigreg.num_slices=16",
    "data.datasets=[{name: shapes, length: 64}]",
    "data.image_size=24",
    "data.num_views=2",
    "data.batch_size=8",
    "training.epochs=2",
    "evaluation.max_train=64",
    "evaluation.max_test=64",
    "evaluation.linear=false",
    "evaluation.dense=false",
    "logging.use_tensorboard=false",
    "logging.use_report=false",
    "logging.log_frequency=1",
    "device=cpu",
)


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines if "loss" in line]


def golden(name: str, found: Any) -> Any:
    """What was recorded under a name; with REWRITE_GOLDEN it is what was found."""
    path = GOLDEN / f"{name}.json"
    if REWRITE:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_golden_losses(small: tuple[str, ...], tmp_path: Path, kind: str) -> None:
    """Ten steps of a fixed run."""
    levels = () if kind == "image_level" else ("model.fpn.use_fpn=true",)
    extra = (*OBJECTIVES[kind], *levels, "data.augmentation.color_jitter=0.4", "data.num_views=2")
    extra += ("training.max_steps=10", "evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path / 'run'}")
    train(load_config(None, (*small, *extra)))
    found = losses(tmp_path / "run")
    expected = golden(kind, found)
    assert len(found) == len(expected) == 10
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=ROUNDING)


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in tests/golden/run, saved after four steps by the release that wrote it."""
    monkeypatch.chdir(tmp_path)  # the run names its folder relative to here
    if REWRITE:
        shutil.rmtree(GOLDEN / "run", ignore_errors=True)
        train(load_config(None, (*TINY, "training.max_steps=4", "evaluation.eval_frequency=0")))
        (newest,) = checkpoint.find(tmp_path / "runs" / "golden" / "checkpoints")
        shutil.copytree(newest, GOLDEN / "run" / "checkpoints" / newest.name)
        shutil.copy(tmp_path / "runs" / "golden" / "config.yaml", GOLDEN / "run")
        shutil.rmtree(tmp_path / "runs")
    shutil.copytree(GOLDEN / "run", tmp_path / "runs" / "golden")
    return tmp_path / "runs" / "golden"


def test_a_checkpoint_of_this_release_is_evaluated_and_continued(released: Path) -> None:
    """Later releases read it, or refuse it by name; rewriting the file is then a change of its schema."""
    assert sum(file.stat().st_size for file in (GOLDEN / "run").rglob("*")) < 100_000
    saved, warnings = checkpoint.load_newest(released / "checkpoints")
    assert saved is not None
    assert not warnings
    sums = {name: float(value.double().abs().sum()) for name, value in saved.weights.items()}
    results = evaluate_run(released, [])
    config = load_config(released / "config.yaml", ["training.max_steps=8"])
    train(config, resume=True)
    found = losses(released)
    recorded = golden("run", {"weights": sums, "results": results, "losses": found})

    assert sums == pytest.approx(recorded["weights"], rel=1e-12)  # read, not computed
    assert results == pytest.approx(recorded["results"], abs=100 / 64 + 1e-6)  # one of 64 images may tip over
    assert len(found) == len(recorded["losses"]) == 4
    for a, b in zip(found, recorded["losses"], strict=True):
        assert a == pytest.approx(b, rel=ROUNDING)
    assert torch.isfinite(torch.tensor([line["loss"] for line in found])).all()
