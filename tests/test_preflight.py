"""`hjepa check`: what it finds, what it predicts, and that it leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from hjepa import preflight
from hjepa.config import Config, load_config
from hjepa.preflight import Report
from hjepa.train import train

Configure = Callable[..., Config]


@pytest.fixture
def configure(small: tuple[str, ...], tmp_path: Path) -> Configure:
    def make(*overrides: str) -> Config:
        return load_config(None, (*small, f"experiment.output_dir={tmp_path / 'runs' / 'x'}", *overrides))

    return make


def check(config: Config, all_images: bool = False) -> Report:
    return preflight.check(config, all_images=all_images, seconds=0.2)


def item(report: Report, name: str) -> str:
    return "\n".join(f"{i.verdict}: {i.text}" for i in report.items if i.name == name)


def write_photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise((70 + i, 64), 60).convert("RGB").save(folder / f"{i:02d}.jpg")
    return folder


def test_a_sound_run_is_all_ok_and_nothing_is_left(configure: Configure, tmp_path: Path) -> None:
    report = check(configure("loss.type=sigreg", "data.num_views=2"))
    assert report.exit_code == 0
    assert {i.verdict for i in report.items} == {"ok"}
    names = [i.name for i in report.items]
    assert names == [
        "config", "model", "parameters", "tokens", "masks", "device", "data", "folder", "step", "evaluation", "memory",
        "disk", "time",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
    assert all(len(line) <= 100 for line in report.table().splitlines() if "/" not in line)


def test_its_numbers_are_those_of_the_model_and_the_run(configure: Configure, tmp_path: Path) -> None:
    config = configure("training.epochs=3", "checkpoint.keep_last_k=3", "loss.type=combined")
    figures = check(config).figures
    assert figures["steps"] == 24
    assert figures["tokens_view"] == 64
    assert figures["images"] == 64
    train(config)
    folder = tmp_path / "runs" / "x" / "checkpoints"
    saves = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in saves[-1].iterdir())
    assert figures["bytes_of_checkpoint"] == pytest.approx(size, rel=0.01)
    assert figures["bytes_of_run"] == figures["bytes_of_checkpoint"] * 4
    from hjepa.build import create_hjepa_from_config

    model = create_hjepa_from_config(config)
    assert figures["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert figures["parameters_trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert figures["parameters_encoder"] == figures["parameters_target_encoder"]
    parts = ("encoder", "predictor", "projector")
    assert figures["parameters_trainable"] == sum(figures[f"parameters_{part}"] for part in parts)


def test_tokens_are_those_that_masks_give(configure: Configure) -> None:
    from hjepa.build import grid_of
    from hjepa.masks import BlockMasks

    config = configure("masking.context_scale=[0.5,0.5]")
    figures = check(config).figures
    masks = BlockMasks(config.masking, grid_of(config), 2)
    import numpy as np

    drawn = [masks.sample(0, step, "view0", np.arange(2)) for step in range(300)]
    context = torch.tensor([float(m.context.shape[1]) for m in drawn]).mean()
    fine = torch.tensor([float(m.targets[0].numel()) for m in drawn]).mean()
    assert figures["tokens_context"] == pytest.approx(float(context), rel=0.1)
    assert figures["tokens_level0"] == pytest.approx(float(fine), rel=0.1)


def test_an_unreadable_file_is_found_and_named(configure: Configure, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 80)
    (folder / "41.jpg").write_text("<html>")
    one = [f"data.datasets=[{{name: folder, path: {folder}}}]"]
    report = check(configure(*one), True)
    assert report.exit_code == 3
    assert "error: folder: 80 images, 100 % of an epoch; of all decoded, 1 cannot be read" in item(report, "data")
    assert "41.jpg" in item(report, "data")
    # 64 of 80 are looked at otherwise.
    (folder / "41.jpg").write_bytes((folder / "40.jpg").read_bytes())
    (folder / "00.jpg").write_bytes(b"")
    report = check(configure(*one))
    assert report.exit_code == 3
    assert "of 64 decoded, 1 cannot be read" in item(report, "data")
    (folder / "00.jpg").unlink()
    report = check(configure(*one))
    assert report.exit_code == 0
    assert item(report, "evaluation").startswith("warning: k-NN skipped")


def test_shares_of_the_sources_are_told(configure: Configure, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 16)
    sets = f"data.datasets=[{{name: shapes, length: 48, weight: 3}}, {{name: folder, path: {folder}}}]"
    for strategy, shares in (("weighted", (75, 25)), ("balanced", (50, 50)), ("concat", (75, 25))):
        text = item(check(configure(sets, f"data.sampling_strategy={strategy}", "training.epochs=1")), "data")
        for share in shares:
            assert f"images, {share} % of an epoch" in text


@pytest.mark.parametrize(
    ("overrides", "name", "said", "code"),
    [
        (("data.datasets=[{name: cifar10}]", "data.download=false", "data.data_path=none"), "data", "cifar10", 3),
        (("device=mps" if not torch.backends.mps.is_available() else "device=cuda",), "device", "machine has none", 2),
        (("data.batch_size=128",), "steps", "is more than an epoch's 64 images", 3),
    ],
    ids=["no data", "no device", "batch too large"],
)
def test_what_would_end_the_run_is_an_error_and_its_code(
    configure: Configure, overrides: tuple[str, ...], name: str, said: str, code: int
) -> None:
    report = check(configure(*overrides))
    assert report.exit_code == code
    assert said in item(report, name)
    assert item(report, name).startswith("error: ")


def test_idle_settings_an_old_run_and_a_long_night_are_warnings(configure: Configure, tmp_path: Path) -> None:
    config = configure("model.layerscale_init=1e-3", "evaluation.eval_frequency=0", "training.epochs=100000000")
    (tmp_path / "runs" / "x" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    report = check(config)
    assert report.exit_code == 0
    assert "warning: model.layerscale_init has no effect: model.use_layerscale is false" in item(report, "config")
    assert item(report, "folder").startswith("warning: ")
    assert "--resume" in item(report, "folder")
    assert item(report, "time").startswith("warning: ")
    assert item(report, "evaluation").startswith("warning: never")


def test_a_limit_on_time_is_planned_for(configure: Configure) -> None:
    free = check(configure("training.epochs=2000")).figures
    report = check(configure("training.epochs=2000", "training.max_time=1m"))
    assert report.figures["steps"] < free["steps"] == 16000
    assert report.figures["seconds_total"] <= 60
    assert "cuts 2000 epochs to" in item(report, "time")


def test_a_batch_of_its_own_choosing_is_told(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(configure("data.batch_size=auto", "data.global_batch_size=32"))
    assert item(report, "batch") == "ok: auto: 32 images a step, computed in 1 part(s)"


def test_json_holds_the_same(configure: Configure) -> None:
    report = check(configure())
    read = json.loads(report.json())
    assert read["figures"] == report.figures
    assert [i["text"] for i in read["items"]] == [i.text for i in report.items]
