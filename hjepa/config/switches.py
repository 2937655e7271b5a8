"""Settings that have a say only where another one is on."""

from __future__ import annotations

from collections.abc import Callable

from hjepa.config.schema import Config
from hjepa.config.walk import flat, general, leaves

SWITCH_KEYS = ("model.fpn.use_fpn", "data.multicrop.num_local_crops", "logging.wandb.enabled")

# A setting that has a say only under another one: where it differs from its default and the other is off, the user
# is told. (prefix of keys, the setting that gives it a say, whether it does)
SWITCHES: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("model.rope.theta", "model.rope.use_rope is false", lambda c: c.model.rope.use_rope),
    ("model.layerscale_init", "model.use_layerscale is false", lambda c: c.model.use_layerscale),
    ("model.fpn.", "model.fpn.use_fpn is false", lambda c: c.model.fpn.use_fpn),
    (
        "model.ema.",
        "model.use_target_encoder and model.use_weight_average are false",
        lambda c: c.model.use_target_encoder or c.model.use_weight_average,
    ),
    (
        "model.use_weight_average",
        "the target encoder (model.use_target_encoder) is the average",
        lambda c: not c.model.use_target_encoder,
    ),
    ("model.predictor.", "loss.hierarchy_weights are all 0", lambda c: c.loss.predicts),
    ("model.fpn.", "loss.hierarchy_weights are all 0", lambda c: c.loss.predicts or not c.model.fpn.use_fpn),
    ("model.projector.hidden_dim", "model.projector.depth is 0", lambda c: c.model.projector.depth > 0),
    ("loss.smoothl1_beta", "loss.type is mse", lambda c: c.loss.type != "mse"),
    ("loss.smoothl1_beta", "loss.hierarchy_weights are all 0", lambda c: c.loss.predicts or c.loss.type == "mse"),
    ("loss.predict_every", "loss.hierarchy_weights are all 0", lambda c: c.loss.predicts),
    ("training.muon_momentum", "training.optimizer is adamw", lambda c: c.training.optimizer == "muon"),
    ("training.warmup_lr", "training.warmup_epochs is 0", lambda c: c.training.warmup_epochs != 0),
    (
        "data.decode_size",
        "no source is read from files of varying size",
        lambda c: any(dataset.name in ("folder", "imagefolder", "imagenet") for dataset in c.data.datasets),
    ),
    (
        "data.max_bad_fraction",
        "no source is read from image files",
        lambda c: any(dataset.name in ("folder", "imagefolder", "imagenet") for dataset in c.data.datasets),
    ),
    ("data.timeout", "data.num_workers is 0", lambda c: c.data.num_workers > 0),
    ("loss.vicreg.", "loss.type is not combined", lambda c: c.loss.type == "combined"),
    ("loss.sigreg.", "loss.type is not sigreg", lambda c: c.loss.type == "sigreg"),
    ("model.projector.", "loss.type compares no views", lambda c: c.loss.has_image_level),
    ("masking.mask_scale", "masking.num_masks is 0", lambda c: c.masking.num_masks > 0),
    ("masking.aspect_ratio", "masking.num_masks is 0", lambda c: c.masking.num_masks > 0),
    ("data.multicrop.", "data.multicrop.num_local_crops is 0", lambda c: c.data.multicrop.num_local_crops > 0),
    ("data.augmentation.blur_sigma", "gaussian_blur is 0", lambda c: c.data.augmentation.gaussian_blur > 0),
    (
        "data.augmentation.color_jitter_probability",
        "nothing is jittered",
        lambda c: c.data.augmentation.color_jitter > 0 or bool(c.data.augmentation.hue_jitter),
    ),
    (
        "data.datasets[].weight",
        "data.sampling_strategy is not weighted",
        lambda c: c.data.sampling_strategy == "weighted",
    ),
    ("evaluation.linear_l2", "evaluation.linear is false", lambda c: c.evaluation.linear),
    ("logging.wandb.", "logging.wandb.enabled is false", lambda c: c.logging.wandb.enabled),
)


def idle_settings(config: Config) -> list[str]:
    """Settings that were changed from their default and have no say, one line each."""
    defaults = {leaf.key: leaf.default for leaf in leaves()}
    changed = [key for key, value in flat(config.model_dump()) if value != defaults[general(key)]]
    return [
        f"{key} has no effect: {reason}"
        for prefix, reason, has_say in SWITCHES
        if not has_say(config)
        for key in changed
        if general(key).startswith(prefix) and key not in SWITCH_KEYS
    ]
