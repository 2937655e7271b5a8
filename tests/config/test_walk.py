from copy import deepcopy

from hjepa.config import load_config
from hjepa.config.schema import Config
from hjepa.config.sections import Training
from hjepa.config.walk import completed, flat, general, leaves


def test_every_field_of_every_section_is_a_leaf_once() -> None:
    keys = [leaf.key for leaf in leaves()]
    assert len(keys) == len(set(keys))
    assert {"device", "model.rope.use_rope", "data.datasets[].name", "logging.wandb.tags"} <= set(keys)
    for name in Training.model_fields:
        assert f"training.{name}" in keys


def test_a_leaf_knows_its_section_and_default() -> None:
    found = {leaf.key: leaf for leaf in leaves()}
    assert found["training.lr"].section is Training
    assert found["training.lr"].default == 5e-4
    assert found["data.datasets[].name"].required
    assert found["data.datasets[].name"].default is None
    assert not found["training.max_time"].required
    assert found["training.max_time"].default is None


def test_a_config_is_flattened_to_the_leaves_of_the_schema() -> None:
    pairs = dict(flat(Config().model_dump()))
    assert pairs["data.datasets[0].name"] == "shapes"
    assert pairs["training.betas"] == (0.9, 0.95)
    assert [general(key) for key in pairs] == [leaf.key for leaf in leaves()]
    two = {"data": {"datasets": [{"name": "a"}, {"name": "b"}]}}
    assert dict(flat(two)) == {"data.datasets[0].name": "a", "data.datasets[1].name": "b"}
    assert general("data.datasets[12].name") == "data.datasets[].name"


def test_a_config_of_an_earlier_release_gets_the_defaults_of_what_is_new() -> None:
    whole = load_config(None, ["model.predictor.depth=2", "data=./photos"]).model_dump(mode="json")
    earlier = deepcopy(whole)
    del (
        earlier["model"]["predictor"]["attention"],
        earlier["model"]["ema"],
        earlier["data"]["augmentation"]["hue_jitter"],
    )
    assert completed(earlier) == whole
    assert earlier != whole
