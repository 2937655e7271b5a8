"""`hjepa compare A B`."""

from pathlib import Path

import pytest

from hjepa.compare import compare
from hjepa.config import dump_config, load_config
from hjepa.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def pair(small: tuple[str, ...], tmp_path: Path) -> tuple[str, str]:
    base = ("evaluation.eval_frequency=0", f"experiment.output_dir={tmp_path}/run")
    (tmp_path / "plain.yaml").write_text(dump_config(load_config(None, (*small, *base))))
    more = (
        "model.use_layerscale=true",
        "training.epochs=5",
        "data.datasets=[{name: shapes, length: 64}, {name: shapes}]",
    )
    (tmp_path / "other.yaml").write_text(dump_config(load_config(None, (*small, *base, *more))))
    return str(tmp_path / "plain.yaml"), str(tmp_path / "other.yaml")


def test_only_what_differs_is_shown_with_its_meaning(pair: tuple[str, str]) -> None:
    found = compare(*pair, [], everything=False, measure=False)
    rows = {key: (a, b) for key, a, b, _ in found.settings}
    assert rows["model.use_layerscale"] == ("false", "true")
    assert rows["training.epochs"] == ("4", "5")
    assert rows["data.datasets[1].name"] == ("-", "shapes")
    assert {key.partition("[")[0] for key in rows} == {"model.use_layerscale", "training.epochs", "data.datasets"}
    assert all(meaning for *_, meaning in found.settings)
    figures = {name: (a, b, ratio) for name, a, b, ratio in found.figures}
    assert figures["patches of a view"] == ("64", "64", "1.00")
    assert not any("time" in name for name in figures)


def test_equal_configs_differ_in_nothing_and_all_shows_all(pair: tuple[str, str]) -> None:
    assert compare(pair[0], pair[0], [], everything=False, measure=False).settings == []
    assert "No setting differs." in compare(pair[0], pair[0], [], everything=False, measure=False).text()
    everything = compare(pair[0], pair[0], [], everything=True, measure=False)
    assert "model.rope.theta" in everything.text()
    assert all(a == b for _, a, b, _ in everything.settings)


def test_overrides_are_for_both(pair: tuple[str, str]) -> None:
    found = compare(*pair, ["training.epochs=7"], everything=False, measure=False)
    assert "training.epochs" not in {key for key, *_ in found.settings}
    with pytest.raises(ConfigError, match=r"did you mean training\.lr"):
        compare(*pair, ["training.learning_rate=7"], everything=False, measure=False)


def test_the_two_nights_of_the_first_project() -> None:
    paths = (str(CONFIGS / "overnight_safe.yaml"), str(CONFIGS / "overnight_training_conservative.yaml"))
    found = compare(*paths, [], everything=False, measure=False)
    differing = {key for key, *_ in found.settings}
    assert differing == {
        "experiment.name",
        "experiment.output_dir",
        "model.use_flash_attention",
        "model.use_layerscale",
        "training.epochs",
        "training.use_gradient_checkpointing",
    }
    text = found.text()
    assert all(len(line) <= 100 for line in text.splitlines())
    page = found.markdown()
    assert "| `training.epochs` | `45` | `50` |" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {5}


@pytest.mark.slow
def test_measuring_adds_time_and_memory_of_both(pair: tuple[str, str]) -> None:
    found = compare(pair[0], pair[0], ["data.cache_gb=0"], everything=False, measure=True)
    figures = {name: (a, b) for name, a, b, _ in found.figures}
    for name in ("time of a step", "time of an epoch", "time of the run", "peak memory", "largest batch that fits"):
        assert all(value not in ("-", "") for value in figures[name])
    assert found.notes == []
    missing = ["data.datasets=[{name: cifar10}]", "data.download=false", "data.data_path=none"]
    found = compare(pair[0], pair[0], missing, everything=False, measure=True)
    assert len(found.notes) == 2
    assert "was not measured" in found.text()
    assert "cifar10" in found.text()


def test_the_page_about_the_night_shows_what_the_command_says() -> None:
    paths = (str(CONFIGS / "overnight_safe.yaml"), str(CONFIGS / "overnight_training_conservative.yaml"))
    page = (CONFIGS.parent / "docs" / "overnight.md").read_text()
    for line in compare(*paths, [], everything=False, measure=False).markdown().splitlines():
        assert line in page
