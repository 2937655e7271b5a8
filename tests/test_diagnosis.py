from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hjepa.config import load_config
from hjepa.diagnosis import Diagnosis
from hjepa.monitor import drift, explained
from hjepa.train import train

QUICK = (
    "data.datasets=[{name: shapes, length: 1024}]",
    "data.image_size=32",
    "data.batch_size=32",
    "masking.mask_scale=[0.15,0.25]",
    "model.embed_dim=48",
    "model.depth=3",
    "model.num_heads=2",
    "model.predictor.embed_dim=24",
    "model.projector.hidden_dim=64",
    "model.projector.output_dim=16",
    "training.optimizer=adamw",
    "training.lr=1.5e-3",
    "training.epochs=7",
    "training.max_steps=200",
    "evaluation.eval_frequency=0",
    "logging.log_frequency=10",
    "logging.use_tensorboard=false",
    "logging.use_report=false",
    "checkpoint.save_frequency=0",
    "device=cpu",
)
FLAT = ("loss.type=smoothl1", "loss.predict_every=1", "loss.hierarchy_weights=[1,0.5]", "data.num_views=1")
ALONE = ("model.use_target_encoder=false", "loss.hierarchy_weights=[0,0]", "masking.num_masks=0")
MUON = ("training.optimizer=muon", "training.lr=5e-3")
NO_SPREAD = ("loss.type=combined", "loss.vicreg.variance_weight=0", "loss.vicreg.covariance_weight=0")


def verdict(tmp_path: Path, recipes: list[Path], capsys: pytest.CaptureFixture[str], *extra: str) -> str:
    recipe = next(path for path in recipes if path.stem == "quickstart")
    train(load_config(recipe, [*QUICK, f"experiment.output_dir={tmp_path / 'run'}", *extra]))
    told = capsys.readouterr().out
    return told.split("Verdict: ")[1].split("\nRun: ")[0]


@pytest.mark.parametrize(
    "extra", [(), FLAT, ("loss.type=combined",), ALONE, MUON], ids=["quick", "flat", "vicreg", "alone", "muon"]
)
def test_a_healthy_run_is_left_in_peace(
    tmp_path: Path, recipes: list[Path], capsys: pytest.CaptureFixture[str], extra: tuple[str, ...]
) -> None:
    assert verdict(tmp_path, recipes, capsys, *extra) == "healthy"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ((*FLAT, "model.ema.momentum=0", "model.ema.momentum_end=0"), "raise model.ema.momentum"),
        (("loss.sigreg.mix=0",), "raise loss.sigreg.mix"),
        ((*ALONE, "loss.sigreg.mix=0"), "raise loss.sigreg.mix"),
        (NO_SPREAD, "raise loss.vicreg.variance_weight"),
        (("training.lr=1.5e-2",), "lower training.lr"),
        ((*FLAT, "training.lr=1.5e-2"), "lower training.lr"),
        ((*MUON, "training.lr=5e-2"), "lower training.lr"),
    ],
    ids=["ema 0", "no sigreg", "no sigreg alone", "no variance", "lr 10x", "lr 10x flat", "lr 10x muon"],
)
def test_a_broken_run_is_named_within_200_steps_with_what_to_change(
    tmp_path: Path, recipes: list[Path], capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], named: str
) -> None:
    found = verdict(tmp_path, recipes, capsys, *extra)
    assert named in found
    assert " since step " in found


def healthy_line(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": 1.0,
        "std/level0": 0.8,
        "std/level1": 0.8,
        "explained/level0": 0.5,
        "explained/level1": 0.5,
        "std/embedding": 0.7,
        "rankme": 12.0,
        "drift": 0.03,
        "update": 0.01,
        "momentum": 0.99,
    }


def test_a_finding_says_since_when_is_told_once_and_goes_when_it_is_over() -> None:
    config = load_config(None, ["model.num_hierarchies=2"])
    diagnosis = Diagnosis(config)
    told: list[tuple[int, str]] = []
    for step in range(100, 1000, 100):
        line = healthy_line(step)
        if 400 <= step <= 800:
            line["std/level1"] = 0.25
        told += [(step, text) for text in diagnosis.read(step, line)]
        diagnosis.read(step, {"eval/knn": 40.0})  # an evaluation between two lines says nothing
        if step == 800:
            assert diagnosis.verdict.startswith("partial collapse at level 1 since step 400: ")
    assert [step for step, _ in told] == [600]
    assert "loss.type=sigreg" in told[0][1]
    assert diagnosis.verdict == "healthy"


def test_each_level_and_the_embedding_are_looked_at() -> None:
    config = load_config(None, ["model.num_hierarchies=2", "loss.type=sigreg", "data.num_views=2"])
    for key, value, named in (
        ("std/level0", 0.02, "collapse at level 0"),
        ("std/level1", 0.2, "partial collapse at level 1"),
        ("explained/level1", -0.5, "no prediction at level 1"),
        ("rankme", 1.2, "collapse of the embedding"),
        ("bad_steps", 2, "steps that were not finite"),
    ):
        diagnosis = Diagnosis(config)
        for step in range(200, 260, 10):
            diagnosis.read(step, healthy_line(step) | {key: value})
        assert diagnosis.verdict.startswith(named)
        assert "\n" not in diagnosis.verdict


def test_what_is_not_finite_or_missing_is_no_finding() -> None:
    diagnosis = Diagnosis(load_config(None))
    for step in range(10, 100, 10):
        assert diagnosis.read(step, {"loss": None, "std/level0": None, "update": None, "drift": None}) == []
    assert diagnosis.verdict == "healthy"


def test_a_resumed_run_remembers_what_was_found(
    tmp_path: Path, recipes: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = next(path for path in recipes if path.stem == "quickstart")
    words = [*QUICK, f"experiment.output_dir={tmp_path / 'run'}", "training.lr=1.5e-2"]
    train(load_config(recipe, [*words, "training.max_steps=20"]))
    assert "too large steps since step 10" in capsys.readouterr().out
    train(load_config(recipe, [*words, "training.max_steps=30"]), resume=True)
    told = capsys.readouterr().out
    assert told.count("too large steps since step 10") == 1  # in the verdict, not as news
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["update"] for line in lines) > 0.1


def test_explained_is_one_for_the_target_and_zero_for_its_mean() -> None:
    target = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0)) * 4 + 2
    mean = target.mean(dim=(0, 1), keepdim=True).expand_as(target)
    assert explained(target, target).item() == pytest.approx(1)
    assert explained(mean, target).item() == pytest.approx(0, abs=1e-5)
    assert explained(-target, target).item() < -1
    assert explained(mean, mean).isnan()


def test_drift_is_relative_to_the_size_of_the_weights() -> None:
    weights = [torch.ones(3, 4), torch.ones(2)]
    assert drift(weights, weights).item() == 0
    assert drift([w * 1.1 for w in weights], weights).item() == pytest.approx(0.1, rel=1e-5)
