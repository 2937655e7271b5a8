"""Every shipped recipe trains two steps, its data replaced by small files in the official layout."""

import re
from pathlib import Path

import pytest
from layouts import write_cifar, write_stl10
from PIL import Image

from hjepa.config import load_config
from hjepa.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


PROMISED = {
    "quickstart", "cifar10", "overnight_safe", "overnight_training_conservative", "imagenette", "folder", "imagenet1k",
    "fpn", "multicrop", "sigreg", "cpu", "photos",
}  # fmt: skip


def write_photos(root: Path) -> Path:
    """Two class folders in train/ and val/, of JPEG files of varying size."""
    for part, count in (("train", 6), ("val", 3)):
        for label in ("n01440764", "n02102040"):
            place = root / part / label
            place.mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((170 + 3 * i, 160), 60).convert("RGB").save(place / f"{part}{label}{i}.JPEG")
    return root


def test_the_recipes_that_were_promised_are_there() -> None:
    assert {f"{name}.yaml" for name in PROMISED} == set(NAMES)
    assert len(NAMES) <= 12


# A ViT-B takes 40 s for its two steps.
SLOW = ("imagenet1k.yaml",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_recipe_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path / "data", "cifar10", monkeypatch)
    write_stl10(tmp_path / "data")
    config = load_config(CONFIGS / name)
    settings = [f"data.data_path={tmp_path / 'data'}", "data.download=false", "device=cpu", "data.num_workers=0"]
    settings += ["training.max_steps=2", "evaluation.max_train=16", "evaluation.max_test=8"]
    settings.append(f"data.{'global_' if config.data.batch_size == 'auto' else ''}batch_size=4")
    if config.data.datasets[0].path is not None:
        settings.append(f"data.datasets.0.path={write_photos(tmp_path / 'photos')}")
    if name == "quickstart.yaml":
        settings.append("data.datasets=[{name: shapes, length: 16}]")
    results = train(load_config(CONFIGS / name, [*settings, f"experiment.output_dir={tmp_path / 'run'}"]))
    found = capsys.readouterr()
    assert "Model created: HJEPA with" in found.out
    assert found.err == ""
    assert (tmp_path / "run" / "report.html").stat().st_size < 5e6
    if name in ("folder.yaml", "photos.yaml"):
        assert results == {}
        assert "folder: 18 images" in found.out
    else:
        assert {"eval/knn", "eval/knn_pixels", "eval/linear_random"} <= results.keys()
    if name.startswith("overnight"):
        assert "CIFAR-10: 20 images" in found.out
        assert "STL-10: " in found.out


@pytest.mark.parametrize("name", NAMES)
def test_the_header_states_command_time_and_expected_result(name: str) -> None:
    header = re.match(r"(#.*\n)+", (CONFIGS / name).read_text())
    assert header is not None
    assert f"train configs/{name}" in header[0]
    for word in ("time", "expect"):
        assert re.search(rf"^# +{word} +\S", header[0], re.MULTILINE), word
    assert "@" not in header[0]


def test_the_night_that_once_crashed_differs_in_what_it_says() -> None:
    safe, bold = (load_config(CONFIGS / f"overnight_{kind}.yaml") for kind in ("safe", "training_conservative"))
    assert (safe.model.use_flash_attention, bold.model.use_flash_attention) == (False, True)
    assert (safe.model.use_layerscale, bold.model.use_layerscale) == (False, True)
    assert bold.model.layerscale_init == 1e-5
    assert (safe.training.use_gradient_checkpointing, bold.training.use_gradient_checkpointing) == (True, False)
    assert (safe.training.epochs, bold.training.epochs) == (45, 50)
