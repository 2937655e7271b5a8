"""What the keys of the first H-JEPA project's configs became: tables only.

A key inside a list stands here without its index. What becomes of a value is said in `convert.py`.
"""

from __future__ import annotations

# The same meaning under another name. Among the old names of one setting, the first that is stated wins.
RENAMED = {
    "seed": "experiment.seed",
    "data.seed": "experiment.seed",
    "logging.experiment_name": "experiment.name",
    "checkpoint.checkpoint_dir": "experiment.output_dir",
    "model.layerscale.use_layerscale": "model.use_layerscale",
    "model.layerscale.init_value": "model.layerscale_init",
    "model.use_rope": "model.rope.use_rope",
    "model.rope_theta": "model.rope.theta",
    "model.use_fpn": "model.fpn.use_fpn",
    "model.fpn_feature_dim": "model.fpn.feature_dim",
    "model.fpn_channels": "model.fpn.feature_dim",
    "model.predictor_depth": "model.predictor.depth",
    "model.predictor_mlp_ratio": "model.predictor.mlp_ratio",
    "training.ema_momentum_schedule.start": "model.ema.momentum",
    "model.target_encoder.ema_decay": "model.ema.momentum",
    "training.ema_momentum_schedule.end": "model.ema.momentum_end",
    "model.target_encoder.ema_end_decay": "model.ema.momentum_end",
    "model.img_size": "data.image_size",
    "data.multicrop.global_crop_size": "data.image_size",
    "data.transforms.train.RandomResizedCrop.size": "data.image_size",
    "data.multicrop.num_global_crops": "data.num_views",
    "data.transforms.crop_scale": "data.augmentation.crop_scale",
    "data.transforms.train.RandomResizedCrop.scale": "data.augmentation.crop_scale",
    "data.multicrop.global_crop_scale": "data.augmentation.crop_scale",
    "data.transforms.horizontal_flip": "data.augmentation.horizontal_flip",
    "data.transforms.train.RandomHorizontalFlip.p": "data.augmentation.horizontal_flip",
    "data.transforms.color_jitter": "data.augmentation.color_jitter",
    "data.transforms.train.ColorJitter.brightness": "data.augmentation.color_jitter",
    "data.transforms.train.ColorJitter.contrast": "data.augmentation.color_jitter",
    "data.transforms.train.ColorJitter.saturation": "data.augmentation.color_jitter",
    "data.transforms.train.RandomApply.transforms.ColorJitter.brightness": "data.augmentation.color_jitter",
    "data.transforms.train.RandomApply.transforms.ColorJitter.contrast": "data.augmentation.color_jitter",
    "data.transforms.train.RandomApply.transforms.ColorJitter.saturation": "data.augmentation.color_jitter",
    "data.multicrop.global_color_jitter": "data.augmentation.color_jitter",
    "data.transforms.train.ColorJitter.hue": "data.augmentation.hue_jitter",
    "data.transforms.train.RandomApply.transforms.ColorJitter.hue": "data.augmentation.hue_jitter",
    "data.transforms.train.RandomApply.p": "data.augmentation.color_jitter_probability",
    "data.transforms.train.RandomGrayscale.p": "data.augmentation.grayscale",
    "data.augmentation.random_gray_scale": "data.augmentation.grayscale",
    "data.transforms.train.Normalize.mean": "data.augmentation.mean",
    "data.transforms.train.Normalize.std": "data.augmentation.std",
    "masking.num_target_masks": "masking.num_masks",
    "masking.num_targets": "masking.num_masks",
    "masking.target_mask_scale": "masking.mask_scale",
    "masking.scale_range": "masking.mask_scale",
    "masking.target_aspect_ratio": "masking.aspect_ratio",
    "masking.aspect_ratio_range": "masking.aspect_ratio",
    "masking.context_mask_scale": "masking.context_scale",
    "loss.vicreg_weight": "loss.vicreg.weight",
    "loss.vicreg_invariance_weight": "loss.vicreg.invariance_weight",
    "loss.vicreg.sim_coeff": "loss.vicreg.invariance_weight",
    "loss.invariance_weight": "loss.vicreg.invariance_weight",
    "loss.vicreg_variance_weight": "loss.vicreg.variance_weight",
    "loss.vicreg.std_coeff": "loss.vicreg.variance_weight",
    "loss.variance_weight": "loss.vicreg.variance_weight",
    "loss.vicreg_covariance_weight": "loss.vicreg.covariance_weight",
    "loss.vicreg.cov_coeff": "loss.vicreg.covariance_weight",
    "loss.covariance_weight": "loss.vicreg.covariance_weight",
    "loss.sigreg_loss_weight": "loss.sigreg.weight",
    "loss.sigreg_num_slices": "loss.sigreg.num_slices",
    "loss.sigreg_char_function_num_quadrature": "loss.sigreg.num_knots",
    "loss.sigreg_num_test_points": "loss.sigreg.num_knots",
    "loss.sigreg_char_function_t_max": "loss.sigreg.t_max",
    "training.learning_rate": "training.lr",
    "training.optimizer.lr": "training.lr",
    "training.optimizer.betas": "training.betas",
    "training.optimizer.weight_decay": "training.weight_decay",
    "training.scheduler_params.min_lr": "training.min_lr",
    "training.scheduler.min_lr": "training.min_lr",
    "training.scheduler_params.warmup_start_lr": "training.warmup_lr",
    "training.gradient_clip": "training.clip_grad",
    "training.mixed_precision": "training.use_amp",
    "model.use_gradient_checkpointing": "training.use_gradient_checkpointing",
    "experiment.save_frequency": "checkpoint.save_frequency",
    "training.checkpoint_freq": "checkpoint.save_frequency",
    "checkpoint.max_checkpoints": "checkpoint.keep_last_k",
    "training.keep_last_n": "checkpoint.keep_last_k",
    "experiment.eval_frequency": "evaluation.eval_frequency",
    "evaluation.knn.frequency": "evaluation.eval_frequency",
    "logging.eval_freq": "evaluation.eval_frequency",
    "evaluation.knn_config.k": "evaluation.knn.k",
    "evaluation.knn_k": "evaluation.knn.k",
    "evaluation.knn_config.temperature": "evaluation.knn.temperature",
    "evaluation.eval_linear_probe": "evaluation.linear",
    "evaluation.linear_probe.enabled": "evaluation.linear",
    "logging.log_freq": "logging.log_frequency",
    "logging.tensorboard.enabled": "logging.use_tensorboard",
    "logging.use_wandb": "logging.wandb.enabled",
    "logging.wandb": "logging.wandb.enabled",
    "logging.wandb_project": "logging.wandb.project",
}

_TRANSFORMS = "data.transforms"

_REASONS = (
    ("hjepa train --resume continues the run in its folder", "checkpoint.resume"),
    ("the last checkpoint is always saved", "checkpoint.save_last"),
    (
        "the newest checkpoints are kept (checkpoint.keep_last_k); checkpoint.metric keeps the best one as well",
        "checkpoint.keep_best_n checkpoint.mode checkpoint.save_best",
    ),
    ("images have three channels here", "data.channels"),
    (
        "it mixes labelled images; there are no labels in pretraining",
        "data.augmentation.deit3.cutmix_alpha data.augmentation.deit3.mixup_alpha "
        "data.augmentation.deit3.mixup_cutmix_prob data.augmentation.deit3.mixup_switch_prob",
    ),
    (
        "masking hides parts of the image already",
        "data.augmentation.deit3.random_erasing_prob data.augmentation.deit3.random_erasing_ratio "
        "data.augmentation.deit3.random_erasing_scale",
    ),
    (
        "there are no augmentation policies; every part of data.augmentation is set by itself",
        "data.augmentation.deit3.auto_augment data.augmentation.deit3.rand_aug_magnitude "
        "data.augmentation.deit3.rand_aug_num_ops data.augmentation.strategy",
    ),
    (
        "the number of local crops is the same in every step",
        "data.multicrop.adaptive data.multicrop.adaptive_config.max_local_crops "
        "data.multicrop.adaptive_config.min_local_crops data.multicrop.adaptive_config.warmup_epochs",
    ),
    ("local crops are jittered as global ones are", "data.multicrop.local_color_jitter"),
    (
        "the probes see the largest centred square of each image, at data.image_size",
        f"{_TRANSFORMS}.val.Resize.size {_TRANSFORMS}.val.CenterCrop.size",
    ),
    (
        "the probes normalise as training does, by data.augmentation.mean and std",
        f"{_TRANSFORMS}.val.Normalize.mean {_TRANSFORMS}.val.Normalize.std",
    ),
    (
        "torchrun says how many processes there are; one process needs no setting",
        "distributed.backend distributed.enabled distributed.world_size",
    ),
    (
        "the linear probe is solved exactly, with nothing to tune by hand (evaluation.linear_l2)",
        "evaluation.linear_probe.batch_size evaluation.linear_probe.epochs evaluation.linear_probe.lr "
        "evaluation.linear_probe_config.batch_size evaluation.linear_probe_config.epochs "
        "evaluation.linear_probe_config.learning_rate",
    ),
    ("the probes use the data sets that are trained on", "evaluation.linear_probe.dataset"),
    ("the number of classes is read from the data", "evaluation.linear_probe_config.num_classes"),
    ("kept as a comment at the top of the new file", "experiment.description"),
    ("metrics.jsonl and tensorboard/ lie in the run's folder, experiment.output_dir", "logging.log_dir"),
    ("images and attention are not logged", "logging.log_attention logging.log_images"),
    ("data.datasets says the shares", "logging.log_dataset_distribution"),
    ("every record holds the norm of the gradient", "logging.log_gradients"),
    ("every record holds the peak memory", "logging.log_memory"),
    ("every record holds every term of the loss", "logging.log_metrics logging.metrics"),
    ("set WANDB_ENTITY in the environment", "logging.wandb.entity"),
    (
        "there is no contrastive term; VICReg (combined) and SIGReg (sigreg) keep the embedding from collapsing",
        "loss.contrastive_on_context loss.contrastive_temperature loss.contrastive_weight loss.use_contrastive "
        "loss.use_cosine_similarity",
    ),
    ("targets never carry a gradient", "loss.detach_targets"),
    ("targets are always layer-normalised", "loss.normalize_embeddings"),
    (
        "the weight of the prediction is that of loss.hierarchy_weights",
        "loss.jepa_weight loss.reconstruction_weight",
    ),
    ("the image level is computed on pooled embeddings", "loss.flatten_patches"),
    ("numerical detail of a formula that is another one here", "loss.eps loss.sigreg_threshold"),
    (
        "the characteristic function is compared from 0 on, weighted by exp(-t^2 / 2)",
        "loss.sigreg_char_function_lambda loss.sigreg_char_function_t_min",
    ),
    ("directions are drawn anew in each step", "loss.sigreg_fixed_slices"),
    ("the characteristic function is the test there is", "loss.sigreg_test_method"),
    ("all directions are computed at once", "loss.sigreg_vectorized"),
    ("the hinge stands at a standard deviation of 1", "loss.vicreg.variance_threshold"),
    ("every level is predicted inside the same blocks", "masking.hierarchical_masking masking.mask_at_levels"),
    ("blocks may overlap, as in I-JEPA", "masking.mask_overlap_threshold"),
    (
        "how many patches stay visible follows from masking.num_masks and masking.mask_scale",
        "masking.max_keep masking.min_keep",
    ),
    ("each view has one context: what no block hides", "masking.num_context_masks"),
    ("global views are masked, local crops are not", "masking.strategy"),
    ("there is one kind of model", "model.type"),
    ("data.datasets says what the data is", "data.type"),
    ("there is no dropout in the predictor", "model.predictor.dropout"),
    ("the predictor takes as many tokens as there are", "model.predictor.max_seq_len"),
    ("attention has its biases always", "model.predictor.qkv_bias"),
    ("the predictor ends in a norm always", "model.predictor_use_norm"),
    ("the projector normalises over the batch always", "model.projection_norm"),
    ("momentum rises over the whole run", "model.target_encoder.ema_anneal_end_step"),
    ("device housekeeping, not needed", "model.use_mps_optimization training.clear_cuda_cache_freq"),
    (
        "the schedule is a cosine after a linear warm-up",
        "training.lr_schedule training.scheduler training.scheduler.type training.scheduler.warmup_type",
    ),
    ("the optimizer is AdamW, or training.optimizer=muon", "training.optimizer.type"),
)

# No counterpart, and why none is needed.
DROPPED = {key: reason for reason, keys in _REASONS for key in keys.split()}

# Another kind of model altogether. Values that mean it; none: whatever the value.
REFUSED: dict[str, tuple[str, ...]] = {
    "model.type": ("lewm",),
    "model.action_dim": (),
    "data.type": ("synthetic_sequential",),
    "data.action_dim": (),
    "data.num_episodes": (),
    "data.seq_len": (),
    "planner": (),
}

# What the old program read and acted on, the preferred spelling first. All else in its configs did nothing.
_READ = """
seed device experiment.output_dir checkpoint.checkpoint_dir logging.experiment_name experiment.name logging.log_dir
checkpoint.keep_best_n checkpoint.mode checkpoint.save_frequency data.augmentation.color_jitter data.batch_size
data.data_path data.dataset data.datasets.name data.datasets.path data.datasets.weight data.image_size
data.num_workers data.pin_memory data.sampling_strategy data.use_multi_dataset evaluation.eval_frequency
logging.log_frequency logging.use_tensorboard logging.tensorboard.enabled logging.use_wandb logging.wandb.enabled
logging.wandb.entity logging.wandb.project logging.wandb.tags loss.type loss.hierarchy_weights loss.jepa_loss_type
loss.jepa_weight loss.detach_targets loss.normalize_embeddings loss.contrastive_on_context
loss.contrastive_temperature loss.contrastive_weight loss.use_contrastive loss.use_cosine_similarity loss.eps
loss.flatten_patches loss.sigreg_char_function_lambda loss.sigreg_char_function_num_quadrature
loss.sigreg_char_function_t_max loss.sigreg_char_function_t_min loss.sigreg_fixed_slices loss.sigreg_loss_weight
loss.sigreg_num_slices loss.sigreg_num_test_points loss.sigreg_test_method loss.sigreg_vectorized
loss.vicreg_covariance_weight loss.vicreg_invariance_weight loss.vicreg_variance_weight loss.vicreg_weight
masking.aspect_ratio masking.mask_scale masking.num_masks model.embed_dim model.encoder_type model.fpn.feature_dim
model.fpn.fusion_method model.fpn.use_fpn model.num_hierarchies model.predictor.depth model.predictor.mlp_ratio
model.predictor.num_heads model.projection_norm model.use_target_encoder training.accumulation_steps training.betas
training.clip_grad training.ema_momentum_schedule.end training.ema_momentum_schedule.start
training.ema_momentum_schedule.warmup_steps training.epochs training.lr training.learning_rate training.lr_schedule
training.optimizer training.scheduler_params.min_lr training.use_amp training.use_gradient_checkpointing
training.warmup_epochs training.weight_decay
"""
READ = tuple(_READ.split())

LOSS_TYPES = {
    "cjepa": "combined",
    "hjepa_sigreg": "sigreg",
    "sigreg_combined": "sigreg",
    "hjepa": "smoothl1",
    "jepa": "smoothl1",
}

# Images that the old program trained on.
DATASET_SIZES = {"cifar10": 50000, "cifar100": 50000, "stl10": 5000, "imagenet": 1281167, "imagenet100": 126689}
