import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa.config import Config, dump_config, load_config
from hjepa.config.describe import settings as all_settings
from hjepa.config.load import leaves
from hjepa.errors import ConfigError


def refusal(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert refused.value.exit_code == 2
    return [line.removeprefix(f"{path}: ").removeprefix(f"{path}, ") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", '"1e-5"', "0.00001", "1E-5"])
def test_a_number_is_the_same_in_all_spellings(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"model:\n  layerscale_init: {text}\n")
    assert load_config(tmp_path / "c.yaml").model.layerscale_init == 1e-5
    assert load_config(None, (f"model.layerscale_init={text}",)).model.layerscale_init == 1e-5


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    found = refusal(
        tmp_path,
        "training:\n  use_amp: 'no'\n  epochs: true\n  lr: -1\nmodel:\n  rope:\n    use_rop: true\ndatta: {}\n",
    )
    assert len(found) == 5
    assert any(line.startswith("training.use_amp (line 2): ") for line in found)
    assert any(line.startswith("training.epochs (line 3): ") for line in found)
    assert any(line.startswith("training.lr (line 4): input should be greater than 0, got -1") for line in found)
    assert "model.rope.use_rop (line 7): unknown key; did you mean model.rope.use_rope?" in found
    assert "datta (line 8): unknown key; did you mean data?" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  epochs: 1\n  epochs: 2\n", "training.epochs is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("- 1\n", "expected sections"),
        ("training: [\n", "line 2"),
        ("x: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("training:\n  lr: .nan\n", "finite"),
        ("training:\n  lr: .inf\n", "finite"),
        ("training:\n  epochs: 10.5\n", "integer"),
        ("training:\n  use_amp: 1\n", "boolean"),
        ("training:\n  lr: true\n", "boolean"),
        ("1: 2\n", "plain word"),
        ("masking:\n  mask_scale: [0.3, 0.1]\n", r"write \[0.1, 0.3\]"),
        ("data:\n  datasets: []\n", "at least 1"),
        ("data:\n  datasets: [{name: folder}]\n", "needs a path"),
        ("data:\n  datasets: [{name: cifar10, split: unlabeled}]\n", "exists for stl10 only"),
        ("model:\n  embed_dim: 100\n  num_heads: 7\n", "num_heads=5"),
        ("model:\n  rope: {use_rope: true}\n  embed_dim: 60\n  num_heads: 10\n", "multiple of 4"),
        ("loss:\n  hierarchy_weights: [1.0]\n", "1 weights for 2 level"),
        ("training:\n  epochs: 3\n  warmup_epochs: 3\n", "at most 2"),
        ("training:\n  accumulation_steps: 3\n", "use 66"),
        ("model:\n  target_layers: [3, 13]\n", "names block 13 of 12"),
        ("data:\n  image_size: 230\n", "use 224 or 240"),
        ("device: gpu\n", "device"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    found = refusal(tmp_path, text)
    assert any(re.search(message, line) for line in found), found


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="no config; the limit"):
        load_config(tmp_path / "big.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "deep.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    "text", ["training.epochs", "=3", "training..epochs=3", "training.epochs=[", "data.datasets.9.name=x"]
)
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, (text,))


def test_an_override_takes_the_place_of_the_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "training:\n  epochs: 3\n", "training.epochs=x")[0].startswith(
        "command line: training.epochs: "
    )


def test_a_path_is_a_whole_config() -> None:
    (dataset,) = load_config(None, ("data=./photos",)).data.datasets
    assert (dataset.name, dataset.path) == ("folder", "./photos")


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    config = load_config(None, ("model.layerscale_init=1e-5", "data=./photos", "training.clip_grad=null"))
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_every_setting_has_a_meaning() -> None:
    rows = list(all_settings())
    assert [row.key for row in rows] == list(leaves())
    assert all(row.meaning for row in rows), [row.key for row in rows if not row.meaning]
    assert len(rows) > 80


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from([name for name in leaves() if "[]" not in name]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.floats(0, 2), max_size=3),
    ),
)
def test_any_value_is_accepted_or_refused_by_name(key: str, value: object) -> None:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    try:
        config = load_config(None, (f"{key}={text}",))
    except ConfigError:
        return
    assert load_config(None, (f"{key}={text}",)) == config
