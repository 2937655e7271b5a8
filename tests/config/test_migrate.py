"""Configs of the first H-JEPA project, all of whose keys and values are in `legacy_keys.json`."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hjepa.config import Config, load_config
from hjepa.config.legacy import DROPPED, READ, RENAMED
from hjepa.config.migrate import Migration, Row, migrate, save, show
from hjepa.config.walk import flat, general, leaves
from hjepa.errors import ConfigError, StorageError

LEGACY: dict[str, list[Any]] = json.loads((Path(__file__).parent / "legacy_keys.json").read_text())
REFUSED_KEYS = {
    *(key for key in LEGACY if key.startswith("planner.")),
    *("model.type", "model.action_dim", "data.type", "data.action_dim", "data.num_episodes", "data.seq_len"),
}
KEYS = {leaf.key for leaf in leaves()}

BASE = """
model: {encoder_type: vit_small_patch16_224, embed_dim: 384, num_hierarchies: 3}
data: {dataset: cifar10, data_path: ./data, image_size: 224, batch_size: 32}
training: {epochs: 300, lr: 1.0e-3, warmup_epochs: 5, lr_schedule: cosine}
loss: {type: mse, hierarchy_weights: [1.0, 0.7, 0.5]}
distributed: {enabled: false}
"""


def migrated(tmp_path: Path, text: str) -> Migration:
    """Migrate, and hold what every migration promises."""
    path = tmp_path / "old.yaml"
    path.write_text(text)
    result = migrate(path)
    stated = list(flat(yaml.safe_load(text)))
    assert [(row.key, row.value) for row in result.rows[: len(stated)]] == stated
    values = dict(flat(result.config.model_dump(mode="json")))
    for row in result.rows:
        assert row.became in values if row.became else row.note
    new = tmp_path / "new.yaml"
    new.write_text(result.yaml)
    assert load_config(new) == result.config
    again = migrate(new)
    assert again.config == result.config
    assert {row.outcome for row in again.rows} <= {"kept"}
    assert [row.key for row in again.rows] == [key for key, _ in flat(yaml.safe_load(result.yaml) or {})]
    return result


def row_of(result: Migration, key: str) -> Row:
    return next(row for row in result.rows if row.key == key)


def value_of(config: Config, key: str) -> Any:
    return dict(flat(config.model_dump(mode="json")))[key]


def with_setting(base: str, key: str, value: Any) -> str:
    """The old config with one setting more, or another value of it."""
    raw = yaml.safe_load(base)
    if key.startswith("data.datasets"):
        raw["data"] = {"use_multi_dataset": True, "datasets": [{"name": "cifar10", "path": "./data", "weight": 1.0}]}
    here: Any = raw
    parts = re.findall(r"\[\]|[^.\[\]]+", key)
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        inner: Any = value if after is None else [{}] if after == "[]" else {}
        if part == "[]":
            here = here[0]
        elif after is None:
            here[part] = inner
        else:
            if not isinstance(here.get(part), dict | list):
                here[part] = inner
            here = here[part]
    return yaml.safe_dump(raw)


@pytest.mark.parametrize("key", LEGACY)
def test_no_key_is_lost(tmp_path: Path, key: str) -> None:
    for value in LEGACY[key]:
        text = with_setting(BASE, key, value)
        if key in REFUSED_KEYS:
            with pytest.raises(ConfigError, match=rf"{re.escape(key)} \(line \d+\): world models with actions"):
                migrated(tmp_path, text)
            continue
        result = migrated(tmp_path, text)
        row = row_of(result, key.replace("[]", "[0]"))
        assert row.value == value
        assert row.outcome != "unknown"


def test_the_tables_speak_of_one_thing_each() -> None:
    assert len(LEGACY) == 278
    assert set(RENAMED.values()) <= KEYS
    assert not set(RENAMED) & (set(DROPPED) | KEYS)
    assert not set(DROPPED) & KEYS
    names = {key.replace("[]", "") for key in LEGACY}
    assert set(READ) <= names
    # What was renamed or dropped and is not among the keys seen, was asked for by name.
    assert set(RENAMED) - names == {"model.layerscale.use_layerscale", "model.layerscale.init_value"}
    assert set(DROPPED) <= names


@pytest.mark.parametrize(
    ("old", "value", "new", "expected"),
    [
        ("training.gradient_clip", 2.0, "training.clip_grad", 2.0),
        ("model.use_rope", True, "model.rope.use_rope", True),
        ("model.rope_theta", 500.0, "model.rope.theta", 500.0),
        ("model.use_fpn", True, "model.fpn.use_fpn", True),
        ("model.fpn_channels", 128, "model.fpn.feature_dim", 128),
        ("model.fpn_feature_dim", 64, "model.fpn.feature_dim", 64),
        ("model.layerscale.init_value", "1e-4", "model.layerscale_init", 1e-4),
        ("model.layerscale.use_layerscale", True, "model.use_layerscale", True),
        ("model.target_encoder.ema_decay", 0.99, "model.ema.momentum", 0.99),
        ("training.ema_momentum_schedule.start", 0.99, "model.ema.momentum", 0.99),
        ("training.ema_momentum_schedule.end", 0.999, "model.ema.momentum_end", 0.999),
        ("training.ema_momentum_schedule.warmup_steps", 3125, "model.ema.momentum_warmup_epochs", 2.0),
        ("masking.num_target_masks", 2, "masking.num_masks", 2),
        ("masking.num_targets", 2, "masking.num_masks", 2),
        ("masking.target_mask_scale", [0.15, 0.4], "masking.mask_scale", [0.15, 0.4]),
        ("masking.scale_range", [0.15, 0.4], "masking.mask_scale", [0.15, 0.4]),
        ("masking.context_mask_scale", [0.85, 1.0], "masking.context_scale", [0.85, 1.0]),
        ("masking.aspect_ratio_range", [0.5, 2.0], "masking.aspect_ratio", [0.5, 2.0]),
        ("masking.target_aspect_ratio", [0.5, 2.0], "masking.aspect_ratio", [0.5, 2.0]),
        ("loss.vicreg.sim_coeff", 10.0, "loss.vicreg.invariance_weight", 10.0),
        ("loss.vicreg.std_coeff", 10.0, "loss.vicreg.variance_weight", 10.0),
        ("loss.vicreg.cov_coeff", 2.0, "loss.vicreg.covariance_weight", 2.0),
        ("loss.vicreg_weight", 0.2, "loss.vicreg.weight", 0.2),
        ("loss.sigreg_num_slices", 64, "loss.sigreg.num_slices", 64),
        ("loss.sigreg_loss_weight", 0.1, "loss.sigreg.weight", 0.1),
        ("loss.sigreg_char_function_t_max", 4.0, "loss.sigreg.t_max", 4.0),
        ("loss.type", "cjepa", "loss.type", "combined"),
        ("loss.type", "hjepa_sigreg", "loss.type", "sigreg"),
        ("loss.type", "smoothl1", "loss.type", "smoothl1"),
        ("loss.use_vicreg", True, "loss.type", "combined"),
        ("loss.use_sigreg", True, "loss.type", "sigreg"),
        ("loss.use_vicreg", False, "loss.type", "mse"),
        ("seed", 7, "experiment.seed", 7),
        ("data.seed", 7, "experiment.seed", 7),
        ("logging.experiment_name", "a b/c", "experiment.name", "a-b-c"),
        ("checkpoint.checkpoint_dir", "results/a/checkpoints", "experiment.output_dir", "results/a"),
        ("checkpoint.checkpoint_dir", "results/checkpoints/a", "experiment.output_dir", "results/checkpoints/a"),
        ("checkpoint.max_checkpoints", 1, "checkpoint.keep_last_k", 2),
        ("training.keep_last_n", 3, "checkpoint.keep_last_k", 3),
        ("logging.save_frequency", 1560, "checkpoint.save_frequency_steps", 1560),
        ("logging.save_frequency", 10, "checkpoint.save_frequency", 10),
        ("logging.wandb", True, "logging.wandb.enabled", True),
        ("logging.tensorboard.enabled", False, "logging.use_tensorboard", False),
        ("logging.wandb_project", "p", "logging.wandb.project", "p"),
        ("data.dataset", "imagenet100", "data.datasets[0].name", "imagefolder"),
        ("data.data_path", "/images", "data.datasets[0].path", "/images"),
        ("data.multicrop.num_global_crops", 2, "data.num_views", 2),
        ("data.multicrop.global_crop_scale", [0.4, 1.0], "data.augmentation.crop_scale", [0.4, 1.0]),
        ("data.multicrop.local_crop_size", 96, "data.multicrop.local_crop_size", 96),
        ("data.transforms.horizontal_flip", True, "data.augmentation.horizontal_flip", 0.5),
        ("data.augmentation.horizontal_flip", False, "data.augmentation.horizontal_flip", 0.0),
        ("data.augmentation.random_crop", False, "data.augmentation.crop_scale", [1.0, 1.0]),
        ("data.transforms.train.RandomApply.p", 0.7, "data.augmentation.color_jitter_probability", 0.7),
        ("data.transforms.train.ColorJitter.brightness", 0.3, "data.augmentation.color_jitter", 0.3),
        ("data.transforms.train.ColorJitter.brightness", 0.3, "data.augmentation.color_jitter_probability", 1.0),
        ("evaluation.eval_frequency", 1560, "evaluation.eval_frequency", 1),
        ("evaluation.eval_frequency", 5, "evaluation.eval_frequency", 5),
        ("evaluation.knn.k_values", [1, 5, 20], "evaluation.knn.k", 20),
        ("evaluation.knn.k_values", [1, 5], "evaluation.knn.k", 5),
        ("evaluation.knn_config.temperature", 0.1, "evaluation.knn.temperature", 0.1),
        ("evaluation.eval_linear_probe", False, "evaluation.linear", False),
        ("training.optimizer.betas", [0.9, 0.99], "training.betas", [0.9, 0.99]),
        ("training.scheduler.min_lr", 1e-5, "training.min_lr", 1e-5),
        ("training.min_lr_ratio", 0.01, "training.min_lr", 1e-5),
        ("training.warmup_lr_ratio", 0.001, "training.warmup_lr", 1e-6),
        ("training.scheduler_params.warmup_start_lr", "1e-6", "training.warmup_lr", 1e-6),
        ("training.mixed_precision", True, "training.use_amp", True),
        ("model.use_gradient_checkpointing", True, "training.use_gradient_checkpointing", True),
        ("training.accumulation_steps", 4, "data.batch_size", 128),
    ],
)
def test_meanings_arrive(tmp_path: Path, old: str, value: Any, new: str, expected: Any) -> None:
    result = migrated(tmp_path, with_setting(BASE, old, value))
    assert value_of(result.config, new) == expected


@pytest.mark.parametrize(
    ("text", "new", "expected", "stands"),
    [
        ("training: {lr: 1e-3, learning_rate: 2e-3}", "training.lr", 1e-3, "training.lr"),
        ("training: {clip_grad: 3.0, gradient_clip: 1.0}", "training.clip_grad", 3.0, "training.clip_grad"),
        ("training: {min_lr: 1e-6, scheduler_params: {min_lr: 1e-5}}", "training.min_lr", 1e-5, "scheduler_params"),
        ("seed: 1\nexperiment: {seed: 2}", "experiment.seed", 1, "seed"),
        (
            "model: {ema: {momentum: 0.99}}\ntraining: {ema_momentum_schedule: {start: 0.996}}",
            "model.ema.momentum",
            0.996,
            "training.ema_momentum_schedule.start",
        ),
        ("masking: {num_masks: 2, num_target_masks: 4}", "masking.num_masks", 2, "masking.num_masks"),
        ("model: {use_rope: true, rope: {use_rope: false}}", "model.rope.use_rope", False, "model.rope.use_rope"),
        (
            "data: {augmentation: {color_jitter: 0.4}, transforms: {color_jitter: 0.1}}",
            "data.augmentation.color_jitter",
            0.4,
            "data.augmentation.color_jitter",
        ),
    ],
)
def test_of_two_spellings_the_one_that_was_read_stands(
    tmp_path: Path, text: str, new: str, expected: Any, stands: str
) -> None:
    result = migrated(tmp_path, text)
    assert value_of(result.config, new) == expected
    (lost,) = (row for row in result.rows if not row.became)
    assert stands in lost.note
    assert ("was read there" in lost.note) == ("rope" not in stands)


def test_two_spellings_that_agree(tmp_path: Path) -> None:
    result = migrated(tmp_path, "training: {learning_rate: 1.0e-3, lr: 1e-3}")
    assert [row.became for row in result.rows] == ["training.lr", "training.lr"]
    assert "training.lr says the same" in row_of(result, "training.learning_rate").note


OVERNIGHT = """
experiment: {name: overnight, seed: 3, output_dir: results/night, description: "only what was\\ttried"}
model:
  encoder_type: vit_small_patch16_224
  embed_dim: 384
  num_hierarchies: 3
  rope: {use_rope: false, theta: 10000.0}
  predictor: {depth: 6, num_heads: 6, mlp_ratio: 4.0, dropout: 0.0, qkv_bias: true}
  target_encoder: {ema_decay: 0.996, ema_end_decay: 1.0, ema_anneal_end_step: 300000}
data:
  use_multi_dataset: true
  data_path: ./data
  datasets:
    - {name: cifar10, weight: 0.6000000000000001}
    - {name: stl10, weight: 0.4, path: /stl}
  sampling_strategy: weighted
  image_size: 224
  batch_size: 16
  transforms: {crop_scale: [0.8, 1.0], horizontal_flip: true, color_jitter: 0.1}
training:
  epochs: 45
  warmup_epochs: 5
  lr: 1.5e-4
  min_lr_ratio: 0.01
  warmup_lr_ratio: 0.001
  accumulation_steps: 2
  use_amp: true
masking: {num_masks: 4, mask_scale: [0.15, 0.2], num_context_masks: 1, context_scale: [0.85, 1.0]}
loss: {type: combined, hierarchy_weights: [1.0, 0.7, 0.5], vicreg_weight: 0.1, vicreg_covariance_weight: 2.0}
checkpoint: {save_best: true, metric: val_loss, mode: min, keep_last_k: 3}
evaluation: {eval_frequency: 10, knn: {enabled: true, k_values: [1, 5, 20], frequency: 10}}
device: mps
"""

IMAGENET = """
model:
  encoder_type: vit_base_patch16_224
  embed_dim: 768
  img_size: 224
  num_hierarchies: 3
  use_fpn: true
  fpn_channels: 256
  predictor_depth: 4
  layerscale_init: 1e-5
data:
  dataset: imagenet
  data_path: /images/imagenet
  batch_size: 128
  num_workers: 8
  transforms:
    train:
      RandomResizedCrop: {size: 224, scale: [0.2, 1.0]}
      RandomApply:
        p: 0.7
        transforms:
          - ColorJitter: {brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1}
      RandomGrayscale: {p: 0.2}
      Normalize: {mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
    val:
      Resize: {size: 256}
training:
  epochs: 100
  learning_rate: 3.0e-4
  optimizer: adamw
  scheduler: cosine
  scheduler_params: {min_lr: 1.0e-6, warmup_start_lr: 1.0e-6}
  ema_momentum_schedule: {start: 0.996, end: 1.0, warmup_steps: 10009}
loss: {type: smoothl1, hierarchy_weights: [1.0, 0.5, 0.25], use_vicreg: true, vicreg: {sim_coeff: 20.0}}
checkpoint: {checkpoint_dir: results/imagenet/checkpoints, keep_best_n: 3, save_frequency: 5}
logging: {log_frequency: 100, wandb: {enabled: true, project: h-jepa, tags: [vit-base]}, tensorboard: {enabled: false}}
evaluation: {eval_frequency: 5, linear_probe: {enabled: false, epochs: 90, lr: 0.1}}
distributed: {enabled: false, backend: nccl, world_size: 1}
seed: 42
"""

MULTICROP = """
model: {encoder_type: vit_tiny_patch16_224, embed_dim: 192, num_hierarchies: 2, use_target_encoder: false}
data:
  dataset: cifar100
  data_path: ./data
  use_multicrop: true
  multicrop:
    num_global_crops: 2
    num_local_crops: 6
    global_crop_size: 224
    local_crop_size: 96
    global_crop_scale: [0.4, 1.0]
    local_crop_scale: [0.05, 0.4]
    adaptive: false
  batch_size: 64
training:
  epochs: 20
  optimizer: {type: adamw, lr: 1.0e-4, betas: [0.9, 0.95], weight_decay: 0.04}
  scheduler: {type: cosine, min_lr: 1.0e-6, warmup_type: linear}
  warmup_epochs: 2
loss:
  type: hjepa_sigreg
  hierarchy_weights: [1.0, 0.5]
  sigreg_num_slices: 64
  sigreg_invariance_weight: 75.0
  sigreg_weight: 25.0
  sigreg_loss_weight: 0.1
  sigreg_char_function_num_quadrature: 32
  sigreg_fixed_slices: false
masking: {strategy: global_only, num_masks: 2, mask_scale: [0.15, 0.25]}
logging: {log_freq: 20, eval_freq: 2, wandb: false}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            OVERNIGHT,
            {
                "experiment.name": "overnight",
                "experiment.output_dir": "results/night",
                "model.ema.momentum": 0.996,
                "model.ema.momentum_end": 1.0,
                "data.datasets[0].name": "cifar10",
                "data.datasets[0].weight": 0.6,
                "data.datasets[1].name": "stl10",
                "data.datasets[1].path": "/stl",
                "data.datasets[1].split": "train",
                "data.data_path": "./data",
                "data.batch_size": 32,
                "data.augmentation.horizontal_flip": 0.5,
                "training.min_lr": 1.5e-6,
                "training.warmup_lr": 1.5e-7,
                "masking.context_scale": [0.85, 1.0],
                "loss.vicreg.covariance_weight": 2.0,
                "checkpoint.keep_last_k": 3,
                "evaluation.knn.k": 20,
                "device": "mps",
            },
        ),
        (
            IMAGENET,
            {
                "experiment.seed": 42,
                "experiment.output_dir": "results/imagenet",
                "model.fpn.use_fpn": True,
                "model.fpn.feature_dim": 256,
                "model.predictor.depth": 4,
                "model.layerscale_init": 1e-5,
                "model.ema.momentum_warmup_epochs": 1.0,
                "data.datasets[0].name": "imagenet",
                "data.datasets[0].path": "/images/imagenet",
                "data.augmentation.crop_scale": [0.2, 1.0],
                "data.augmentation.color_jitter": 0.4,
                "data.augmentation.hue_jitter": 0.1,
                "data.augmentation.color_jitter_probability": 0.7,
                "data.augmentation.grayscale": 0.2,
                "data.augmentation.mean": [0.5, 0.5, 0.5],
                "training.lr": 3e-4,
                "training.warmup_lr": 1e-6,
                "loss.type": "combined",
                "loss.vicreg.invariance_weight": 20.0,
                "logging.wandb.tags": ["vit-base"],
                "logging.use_tensorboard": False,
                "evaluation.linear": False,
            },
        ),
        (
            MULTICROP,
            {
                "data.num_views": 2,
                "data.multicrop.num_local_crops": 6,
                "data.multicrop.local_crop_size": 96,
                "data.augmentation.crop_scale": [0.4, 1.0],
                "model.use_target_encoder": False,
                "loss.type": "sigreg",
                "loss.sigreg.mix": 0.25,
                "loss.sigreg.weight": 0.1,
                "loss.sigreg.num_knots": 32,
                "training.lr": 1e-4,
                "training.weight_decay": 0.04,
                "logging.log_frequency": 20,
                "logging.wandb.enabled": False,
                "evaluation.eval_frequency": 2,
            },
        ),
    ],
    ids=["overnight", "imagenet", "multicrop"],
)
def test_whole_configs(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    result = migrated(tmp_path, text)
    values = dict(flat(result.config.model_dump(mode="json")))
    assert {key: values[key] for key in expected} == expected
    assert not any(row.outcome == "unknown" for row in result.rows)
    text = show(result)
    assert max(map(len, text.splitlines())) <= 100
    assert all(row.key in text for row in result.rows)
    assert text.splitlines()[-1].startswith(f"{len(result.rows)} settings: ")
    stated = {general(key) for key, _ in flat(yaml.safe_load(result.yaml))}
    assert "training.eps" not in stated, "a default was written down"


def test_the_new_file_is_one_to_read(tmp_path: Path) -> None:
    text = migrated(tmp_path, OVERNIGHT).yaml
    head = ["# Migrated from old.yaml by hjepa migrate.", "# only what was tried", "experiment:"]
    assert text.splitlines()[:3] == head
    assert "  min_lr: 1.5e-6\n" in text
    assert "    - {name: cifar10, weight: 0.6}\n" in text
    sections = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert sections == [name for name in Config.model_fields if name in sections]


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("loss: {hierarchy_weights: [1.0, 0.5, 0.2]}", "loss.hierarchy_weights", {"model.num_hierarchies": 3}),
        (
            "model: {num_hierarchies: 2}\nloss: {hierarchy_weights: [1.0, 0.5, 0.2]}",
            "loss.hierarchy_weights",
            {"loss.hierarchy_weights": [1.0, 0.5]},
        ),
        (
            "model: {num_hierarchies: 3}\nloss: {hierarchy_weights: [1.0]}",
            "loss.hierarchy_weights",
            {"loss.hierarchy_weights": [1.0, 0.5, 0.25]},
        ),
        ("training: {epochs: 3, warmup_epochs: 10}", "training.warmup_epochs", {"training.warmup_epochs": 2.0}),
        (
            "training: {lr: 1e-5, scheduler_params: {min_lr: 1.5e-4}}",
            "training.scheduler_params.min_lr",
            {"training.min_lr": 1e-5},
        ),
        (
            "model: {encoder_type: vit_base_patch16_224, embed_dim: 384}",
            "model.embed_dim",
            {
                "model.encoder_type": "vit",
                "model.patch_size": 16,
                "model.embed_dim": 384,
                "model.depth": 12,
                "model.num_heads": 12,
            },
        ),
        (
            "model: {encoder_type: vit_base_patch16_224, num_heads: 6}",
            "model.num_heads",
            {"model.encoder_type": "vit", "model.embed_dim": 768, "model.num_heads": 6},
        ),
        (
            "model: {encoder_type: vit_tiny_patch16_224, predictor: {num_heads: 5}}",
            "model.predictor.num_heads",
            {"model.predictor.num_heads": 4},
        ),
        (
            "loss: {type: mse}\ndata: {multicrop: {num_local_crops: 6}}",
            "data.multicrop.num_local_crops",
            {"data.multicrop.num_local_crops": 0},
        ),
        (
            "model: {num_hierarchies: 4}\nmasking: {num_target_masks: 1, target_mask_scale: [0.15, 0.2]}",
            "masking.target_mask_scale",
            {"masking.num_masks": 1},
        ),
    ],
)
def test_what_does_not_go_together_is_mended_and_said(
    tmp_path: Path, text: str, key: str, values: dict[str, Any]
) -> None:
    result = migrated(tmp_path, text)
    assert {name: value_of(result.config, name) for name in values} == values
    assert row_of(result, key).note


def test_what_has_no_obvious_way_out_is_the_loaders_to_say(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "model: {encoder_type: vit_base_patch16_224}\ndata:\n  dataset: cifar10\n  img: 1\n  image_size: 230\n"
    )
    with pytest.raises(ConfigError, match=r"old.yaml: data.image_size \(line 5\): 230 .* use 224 or 240"):
        migrate(path)
    path.write_text("model:\n  embed_dim: 100\n  pretrained: true\ndistributed: {enabled: false}\n")
    with pytest.raises(ConfigError, match=r"model.embed_dim \(line 2\): 100 is not vit_small_patch16_224's 384"):
        migrate(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  learning_rate: fast\n", r"training.lr \(line 2\): expected a number"),
        ("training:\n  min_lr_ratio: [1]\n", r"training.min_lr_ratio \(line 2\): \[1\] is not a value"),
        ("training:\n  learning_rate: 1\n  learning_rate: 2\n", "given twice"),
        ("training.lr: 1\ntraining: {lr: 2}\n", "given twice"),
        ("data: {dataset: imagenet}\n", "imagenet needs a path"),
        ("data: {dataset: places}\n", "data.datasets"),
        ("model: vit\n", "model"),
        ("data: {datasets: [cifar10]}\n", "data.datasets"),
        ("[1]\n", "expected sections"),
    ],
)
def test_values_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "old.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        migrate(tmp_path / "old.yaml")


def test_world_models_are_refused_with_all_they_name(tmp_path: Path) -> None:
    path = tmp_path / "lewm.yaml"
    path.write_text("model: {type: lewm, action_dim: 4}\ndata: {seq_len: 16}\nplanner: {horizon: 8, other: 1}\n")
    with pytest.raises(ConfigError) as refused:
        migrate(path)
    (line,) = str(refused.value).splitlines()
    for key in ("model.type", "model.action_dim", "data.seq_len", "planner.horizon", "planner.other"):
        assert key in line


def test_unknown_keys_are_left_out_and_counted(tmp_path: Path) -> None:
    result = migrated(tmp_path, BASE + "\nextra: {a: 1}\nlogging: {log_frequencey: 10}\n")
    unknown = [row.key for row in result.rows if row.outcome == "unknown"]
    assert unknown == ["extra.a", "logging.log_frequencey"]
    assert "did you mean logging.log_frequency?" in show(result)
    assert show(result).endswith("2 unknown")


def test_data_sets_that_the_old_program_did_not_look_at(tmp_path: Path) -> None:
    both = "data: {dataset: cifar100, datasets: [{name: cifar10}], %s}"
    for switch in ("use_multi_dataset: false", "image_size: 224"):
        result = migrated(tmp_path, both % switch)
        assert [source.name for source in result.config.data.datasets] == ["cifar100"]
        assert "data.dataset says it" in row_of(result, "data.datasets[0].name").note
    result = migrated(tmp_path, both % "use_multi_dataset: true")
    assert [source.name for source in result.config.data.datasets] == ["cifar10"]
    result = migrated(tmp_path, "data: {use_multi_dataset: false, datasets: [{name: cifar10}]}")
    assert [source.name for source in result.config.data.datasets] == ["cifar10"]


def test_class_folders_take_the_common_path(tmp_path: Path) -> None:
    result = migrated(
        tmp_path, "data: {use_multi_dataset: true, data_path: /all, datasets: [{name: imagenet100, path: ''}]}"
    )
    assert result.config.data.datasets[0].path == "/all"


def test_switched_off_local_crops_take_their_settings_along(tmp_path: Path) -> None:
    for switch in ("use_multicrop: false", "multi_crop: {enabled: false}"):
        result = migrated(
            tmp_path, f"loss: {{type: combined}}\ndata: {{{switch}, multicrop: {{num_local_crops: 6, adaptive: true}}}}"
        )
        assert result.config.data.multicrop.num_local_crops == 0
        assert "is false" in row_of(result, "data.multicrop.num_local_crops").note


def test_without_any_probe_there_is_no_evaluation(tmp_path: Path) -> None:
    off = "evaluation: {eval_frequency: 5, eval_knn: false, eval_linear_probe: %s}"
    assert migrated(tmp_path, off % "false").config.evaluation.eval_frequency == 0
    result = migrated(tmp_path, off % "true")
    assert result.config.evaluation.eval_frequency == 5
    assert "k-NN belongs to every evaluation" in row_of(result, "evaluation.eval_knn").note


def test_steps_become_epochs_where_the_data_say_how_many(tmp_path: Path) -> None:
    text = "data: {dataset: %s, data_path: ./x, batch_size: 50}\ntraining: {ema_momentum_schedule: {warmup_steps: 200}}"
    assert migrated(tmp_path, text % "stl10").config.model.ema.momentum_warmup_epochs == 2.0
    row = row_of(migrated(tmp_path, text % "folder"), "training.ema_momentum_schedule.warmup_steps")
    assert row.outcome == "dropped"
    assert "is not known" in row.note


def test_todays_configs_stay_what_they_are(tmp_path: Path) -> None:
    recipes = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        result = migrated(tmp_path, recipe.read_text())
        assert result.config == load_config(recipe)
        assert {row.outcome for row in result.rows} == {"kept"}
    # A batch of all accumulated parts today, of one of them there.
    text = "data: {batch_size: 32}\ntraining: {accumulation_steps: 4}\n"
    assert migrated(tmp_path, text).config.data.batch_size == 32
    assert migrated(tmp_path, f"{text}seed: 1\n").config.data.batch_size == 128
    (tmp_path / "folder.yaml").write_text("data: ./photos\n")
    assert migrate(tmp_path / "folder.yaml").config == load_config(tmp_path / "folder.yaml")


def test_sections_left_empty_have_their_row(tmp_path: Path) -> None:
    result = migrated(tmp_path, "training:\nlogging: {wandb: null}\nmodel: {}\nseed: 3\n")
    assert [row.key for row in result.rows] == ["training", "logging.wandb", "seed"]
    assert all("an empty section" in row.note for row in result.rows[:2])


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    result = migrated(tmp_path, BASE)
    save(result, tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml") == result.config
    with pytest.raises(StorageError, match="not overwritten"):
        save(result, tmp_path / "a.yaml")
    with pytest.raises(StorageError, match="cannot be written"):
        save(result, tmp_path / "none" / "a.yaml")


def test_torch_is_not_needed() -> None:
    code = "import sys, hjepa.config.migrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2000),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(0, 2), max_size=4),
    st.sampled_from([value for values in LEGACY.values() for value in values]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted({*LEGACY, *KEYS} - REFUSED_KEYS)), VALUES, min_size=1, max_size=4))
def test_any_values_end_in_a_config_or_a_clear_refusal(tmp_path: Path, stated: dict[str, Any]) -> None:
    text = BASE
    for key, value in stated.items():
        if not any(other.startswith(f"{key}.") for other in stated):
            text = with_setting(text, key, value)
    with suppress(ConfigError):
        assert show(migrated(tmp_path, text))
