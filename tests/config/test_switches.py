"""Every row of the table: a setting that is idle is named, and the same setting is not where it has a say."""

import pytest

from hjepa.config import load_config
from hjepa.config.switches import SWITCH_KEYS, SWITCHES, idle_settings
from hjepa.config.walk import leaves

FPN = ("model.fpn.use_fpn=true", "model.fpn.fusion_method=concat")
SIGREG = ("loss.type=sigreg",)
NO_PREDICTION = ("loss.hierarchy_weights=[0,0]", "loss.type=sigreg", "data.num_views=2")

# (prefix, setting that is changed, what makes it idle, what gives it a say)
EXAMPLES = [
    ("model.rope.theta", "model.rope.theta=100", (), ("model.rope.use_rope=true",)),
    ("model.layerscale_init", "model.layerscale_init=0.1", (), ("model.use_layerscale=true",)),
    ("model.fpn.", "model.fpn.fusion_method=concat", (), ("model.fpn.use_fpn=true",)),
    ("model.ema.", "model.ema.momentum=0.9", ("model.use_target_encoder=false",), ()),
    ("model.use_weight_average", "model.use_weight_average=true", (), ("model.use_target_encoder=false",)),
    ("model.predictor.", "model.predictor.depth=2", NO_PREDICTION, ()),
    ("model.fpn.", "model.fpn.fusion_method=concat", (*FPN, *NO_PREDICTION), FPN),
    ("model.projector.hidden_dim", "model.projector.hidden_dim=64", (*SIGREG, "model.projector.depth=0"), SIGREG),
    ("loss.smoothl1_beta", "loss.smoothl1_beta=0.5", ("loss.type=mse",), SIGREG),
    ("loss.smoothl1_beta", "loss.smoothl1_beta=0.5", NO_PREDICTION, SIGREG),
    ("loss.predict_every", "loss.predict_every=2", (*NO_PREDICTION, "data.num_views=2"), (*SIGREG, "data.num_views=2")),
    ("training.muon_momentum", "training.muon_momentum=0.9", (), ("training.optimizer=muon",)),
    ("training.warmup_lr", "training.warmup_lr=1e-5", ("training.warmup_epochs=0",), ()),
    ("data.decode_size", "data.decode_size=64", (), ("data.datasets=[{name: folder, path: x}]",)),
    ("data.max_bad_fraction", "data.max_bad_fraction=0.5", (), ("data.datasets=[{name: folder, path: x}]",)),
    ("data.timeout", "data.timeout=9", (), ("data.num_workers=2",)),
    ("loss.vicreg.", "loss.vicreg.weight=1", ("loss.type=sigreg",), ("loss.type=combined",)),
    ("loss.sigreg.", "loss.sigreg.mix=0.5", ("loss.type=combined",), ("loss.type=sigreg",)),
    ("model.projector.", "model.projector.depth=1", (), ("loss.type=sigreg",)),
    ("masking.mask_scale", "masking.mask_scale=[0.1,0.2]", (*NO_PREDICTION, "masking.num_masks=0"), ()),
    ("masking.aspect_ratio", "masking.aspect_ratio=[0.5,1.5]", (*NO_PREDICTION, "masking.num_masks=0"), NO_PREDICTION),
    (
        "data.multicrop.",
        "data.multicrop.local_crop_scale=[0.1,0.2]",
        ("loss.type=sigreg",),
        ("loss.type=sigreg", "data.multicrop.num_local_crops=2"),
    ),
    (
        "data.augmentation.blur_sigma",
        "data.augmentation.blur_sigma=[1,2]",
        (),
        ("data.augmentation.gaussian_blur=0.1",),
    ),
    (
        "data.augmentation.color_jitter_probability",
        "data.augmentation.color_jitter_probability=0.5",
        (),
        ("data.augmentation.hue_jitter=0.1",),
    ),
    (
        "data.datasets[].weight",
        "data.datasets=[{name: shapes, weight: 2}]",
        (),
        ("data.sampling_strategy=weighted",),
    ),
    ("evaluation.linear_l2", "evaluation.linear_l2=[1]", ("evaluation.linear=false",), ()),
    ("logging.wandb.", "logging.wandb.project=mine", (), ("logging.wandb.enabled=true",)),
]  # fmt: skip


def idle(*overrides: str) -> list[str]:
    return idle_settings(load_config(None, overrides))


@pytest.mark.parametrize(
    ("prefix", "setting", "off", "on"), EXAMPLES, ids=[f"{e[0]} {i}" for i, e in enumerate(EXAMPLES)]
)
def test_a_setting_without_a_say_is_named(prefix: str, setting: str, off: tuple[str, ...], on: tuple[str, ...]) -> None:
    told = [line for line in idle(*off, setting) if line.startswith(prefix.replace("[]", "[0]"))]
    assert len(told) == 1
    assert " has no effect: " in told[0]
    assert not [line for line in idle(*on, setting) if line.startswith(prefix.replace("[]", "[0]"))]


def test_every_row_has_its_example_and_names_settings_that_exist() -> None:
    assert [prefix for prefix, _, _ in SWITCHES] == [prefix for prefix, *_ in EXAMPLES]
    keys = [leaf.key for leaf in leaves()]
    assert all(any(key.startswith(prefix) for key in keys) for prefix, _, _ in SWITCHES)
    assert set(SWITCH_KEYS) <= set(keys)


def test_every_row_gives_its_own_reason() -> None:
    for (prefix, reason, _), (_, setting, off, _) in zip(SWITCHES, EXAMPLES, strict=True):
        named = [line for line in idle(*off, setting) if line.startswith(prefix.replace("[]", "[0]"))]
        assert named[0].endswith(f" has no effect: {reason}"), (prefix, named)


def test_defaults_are_never_named() -> None:
    assert idle() == []
    assert idle(*NO_PREDICTION, "masking.num_masks=0", "model.use_target_encoder=false") == []
    assert idle("model.rope.theta=10000") == []
    assert idle("loss.type=combined", "data.num_views=2") == []


def test_a_switch_itself_is_never_named() -> None:
    assert idle("model.fpn.use_fpn=true", "model.num_hierarchies=1") == []
    assert idle("logging.wandb.enabled=true") == []


def test_each_entry_of_a_list_is_named_by_its_number() -> None:
    text = "data.datasets=[{name: shapes}, {name: shapes, weight: 2}]"
    assert idle(text) == ["data.datasets[1].weight has no effect: data.sampling_strategy is not weighted"]
