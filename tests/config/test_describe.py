"""The settings as text: on the page, and at the terminal."""

from pathlib import Path

import pytest

from hjepa.config import Config
from hjepa.config.describe import settings, settings_page, settings_table
from hjepa.config.walk import leaves
from hjepa.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_every_setting_has_a_meaning() -> None:
    rows = settings()
    assert [row.key for row in rows] == [leaf.key for leaf in leaves()]
    assert all(row.meaning and row.takes for row in rows), [row.key for row in rows if not row.meaning]
    assert len(rows) > 80


def test_the_page_is_the_schema() -> None:
    assert PAGE.read_text() == settings_page(), "python -m hjepa.config.describe > docs/configuration.md"


def test_the_page_has_every_setting_once() -> None:
    lines = settings_page().splitlines()
    for leaf in leaves():
        assert sum(line.startswith(f"| `{leaf.key}` |") for line in lines) == 1, leaf.key
    assert all(line.count("|") - line.count("\\|") == 5 for line in lines if line.startswith("| "))


@pytest.mark.parametrize(
    ("key", "takes", "default"),
    [
        ("training.lr", "number > 0", "0.0005"),
        ("training.betas", "2 of (number >= 0 < 1)", "[0.9, 0.95]"),
        ("training.clip_grad", "number > 0 or null", "1"),
        ("training.max_time", "duration such as 8h, 90m or 1h30m or null", "-"),
        ("data.batch_size", "integer >= 1, or auto", "64"),
        ("data.datasets[].name", "shapes, cifar10, cifar100, stl10, imagenet, imagefolder, folder", "(required)"),
        ("masking.mask_scale", "[low, high] within (0, 1]", "[0.15, 0.2]"),
        ("model.use_flash_attention", "true, false or auto", "auto"),
        ("loss.hierarchy_weights", "list of (number >= 0) or null", "-"),
        ("logging.wandb.tags", "list of (text)", "[]"),
    ],
)
def test_what_a_setting_takes_is_said_in_words(key: str, takes: str, default: str) -> None:
    (row,) = settings([key])
    assert (row.takes, row.default) == (takes, default)


def test_sections_are_chosen_by_name() -> None:
    assert {row.key.partition(".")[0] for row in settings(["model", "loss.vicreg"])} == {"model", "loss"}
    assert [row.key for row in settings(["loss.vicreg"])] == [
        f"loss.vicreg.{name}" for name in ("weight", "invariance_weight", "variance_weight", "covariance_weight")
    ]
    assert all(row.key.startswith("data.datasets[].") for row in settings(["data.datasets"]))
    assert settings_table(["device"]).startswith("device  (auto, cpu, cuda, mps; auto)\n    ")
    with pytest.raises(ConfigError, match="'mod': no such section; there are experiment, model, data"):
        settings(["mod"])


def test_what_a_page_promises_of_a_default_is_the_default() -> None:
    for leaf in leaves():
        value = Config().model_dump()
        for part in leaf.key.split("."):
            if "[]" in part:
                break
            value = value[part]
        else:
            assert value == leaf.default, leaf.key
