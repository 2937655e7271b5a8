"""Every setting there is: type, range, default and one line of meaning.

Checks that need one section live in that section; checks across sections live in `geometry.py`. A constructor
takes its section, so no setting is written down twice.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hjepa.config.geometry import ENCODERS, EncoderShape, cross_checks, encoder_shape
from hjepa.config.types import Bool, Float, Int, Interval, Section, Str

Positive = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]
Unit = Annotated[Float, Field(ge=0, le=1)]
Weight = Annotated[Float, Field(ge=0)]
Scale = Annotated[Float, Field(gt=0)]


class Experiment(Section):
    """What the run is called, where it is kept and what it draws its randomness from."""

    name: Annotated[Str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "hjepa", description="name of the run; letters, digits, dot, dash, underscore"
    )
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = Field(
        42, description="seed of weights, sample order, augmentation and masks"
    )
    output_dir: Str | None = Field(None, description="folder of the run; runs/<name> when not given")


class Rope(Section):
    """Rotary position embedding (Su et al. 2021, axial in two dimensions)."""

    use_rope: Bool = Field(False, description="rotary positions in place of learned absolute ones")
    theta: Annotated[Float, Field(gt=1)] = Field(10000.0, description="base of the rotary frequencies")


class FPN(Section):
    """Top-down path among the predicted levels (Lin et al. 2017)."""

    use_fpn: Bool = Field(False, description="fuse each coarse prediction into the next finer one")
    feature_dim: Positive | None = Field(
        None, description="channels of the top-down path; the predictor's width when not given"
    )
    fusion_method: Literal["add", "concat"] = Field("add", description="how two levels are fused")


class Predictor(Section):
    """The narrow transformer that says what the target encoder would have computed."""

    embed_dim: Positive | None = Field(None, description="width; half the encoder's when not given")
    depth: Positive = Field(4, description="number of blocks")
    num_heads: Positive | None = Field(None, description="attention heads; the encoder's head width when not given")
    mlp_ratio: Scale = Field(4.0, description="hidden width of the MLP as a multiple of the width")


class EMA(Section):
    """The target encoder as a slow average of the context encoder.

    Momentum rises from `momentum` to `momentum_end` along a half cosine over the run. Left out, both follow the
    length of the run: an average over 1 % of the steps at first, over 10 % at the end.
    """

    momentum: Annotated[Float, Field(ge=0, lt=1)] | None = Field(
        None, description="momentum at the first step; 1 - 100/steps when not given"
    )
    momentum_end: Unit | None = Field(None, description="momentum at the last step; 1 - 10/steps when not given")
    momentum_warmup_epochs: Weight = Field(
        0.0, description="epochs over which the averaging horizon grows from one step to its scheduled length"
    )


class Projector(Section):
    """MLP between the pooled embedding and the image-level loss; not part of the exported encoder."""

    depth: Count = Field(2, description="hidden layers; 0 is a linear map")
    hidden_dim: Positive = Field(512, description="width of the hidden layers")
    output_dim: Annotated[Int, Field(ge=2)] = Field(64, description="width of the embedding that is regularised")


class Model(Section):
    """Encoder, predictor and their options."""

    encoder_type: Literal[tuple(ENCODERS)] = Field(  # type: ignore[valid-type]
        "vit_small_patch16_224", description="timm name of the encoder"
    )
    patch_size: Positive | None = Field(None, description="patch side in pixels; the name's when not given")
    embed_dim: Positive | None = Field(None, description="encoder width; the name's when not given")
    depth: Positive | None = Field(None, description="encoder blocks; the name's when not given")
    num_heads: Positive | None = Field(None, description="encoder heads; the name's when not given")
    pretrained: Bool = Field(False, description="start from timm's released weights of encoder_type")
    drop_path_rate: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0, description="stochastic depth of the context encoder, growing linearly to this rate"
    )
    use_flash_attention: Bool = Field(True, description="fused attention; off computes the explicit product")
    use_layerscale: Bool = Field(False, description="learned per-channel scale on every residual branch")
    layerscale_init: Scale = Field(1e-5, description="initial value of that scale")
    num_hierarchies: Annotated[Int, Field(ge=1, le=4)] = Field(
        2, description="number of levels; level l predicts means over 2^l x 2^l patches"
    )
    target_layers: tuple[Positive, ...] | None = Field(
        None,
        description="encoder blocks (1 = first) whose output is predicted; three spread over the depth when not given",
    )
    rope: Rope = Rope()
    fpn: FPN = FPN()
    predictor: Predictor = Predictor()
    projector: Projector = Projector()
    ema: EMA = EMA()

    @property
    def shape(self) -> EncoderShape:
        """The encoder's shape: what its name says, less what is overridden."""
        return encoder_shape(self.encoder_type, self.patch_size, self.embed_dim, self.depth, self.num_heads)

    @model_validator(mode="after")
    def _check(self) -> Model:
        shape = self.shape
        if shape.embed_dim % shape.num_heads:
            raise ValueError(
                f"embed_dim {shape.embed_dim} is not a multiple of num_heads {shape.num_heads}; "
                f"try num_heads={shape.nearest_heads()}"
            )
        if self.rope.use_rope and (shape.embed_dim // shape.num_heads) % 4:
            raise ValueError(
                f"rope.use_rope needs a head width that is a multiple of 4, got {shape.embed_dim // shape.num_heads}"
                f" ({shape.embed_dim}/{shape.num_heads}); change num_heads"
            )
        if self.pretrained and (self.embed_dim or self.depth or self.num_heads):
            raise ValueError("pretrained excludes embed_dim, depth and num_heads: the weights fix the shape")
        if self.pretrained and self.rope.use_rope:
            raise ValueError("pretrained excludes rope.use_rope: the released weights have learned positions")
        if self.pretrained and self.use_layerscale:
            raise ValueError("pretrained excludes use_layerscale: the released weights have none")
        if self.target_layers is not None:
            if list(self.target_layers) != sorted(set(self.target_layers)) or not self.target_layers:
                raise ValueError("target_layers must be distinct, ascending and at least one")
            if self.target_layers[-1] > shape.depth:
                raise ValueError(f"target_layers names block {self.target_layers[-1]} of {shape.depth}")
        predictor_dim = self.predictor.embed_dim or shape.embed_dim // 2
        if self.predictor.num_heads and predictor_dim % self.predictor.num_heads:
            raise ValueError(
                f"predictor.num_heads {self.predictor.num_heads} does not divide the predictor's width {predictor_dim}"
            )
        if predictor_dim % 4:
            raise ValueError(f"predictor.embed_dim must be a multiple of 4 (sine positions), got {predictor_dim}")
        return self


class Dataset(Section):
    """One source of the mixture."""

    name: Literal["shapes", "cifar10", "cifar100", "stl10", "imagenet", "imagefolder", "folder"] = Field(
        description="kind of source; folder takes any nested folder without labels"
    )
    path: Str | None = Field(None, description="where the images lie; data.data_path when not given")
    weight: Scale = Field(1.0, description="share of the samples under sampling_strategy: weighted")
    split: Literal["train", "test", "val", "unlabeled", "train+unlabeled"] | None = Field(
        None, description="part that is trained on; train (stl10: train+unlabeled) when not given"
    )
    length: Positive | None = Field(None, description="number of images; shapes only (20000 when not given)")

    @model_validator(mode="after")
    def _check(self) -> Dataset:
        if self.length is not None and self.name != "shapes":
            raise ValueError(f"length is for the procedural source shapes; {self.name} has as many images as it has")
        if self.split in ("unlabeled", "train+unlabeled") and self.name != "stl10":
            raise ValueError(f"split {self.split!r} exists for stl10 only; {self.name} has train and test")
        if self.split is not None and self.name == "folder":
            raise ValueError("folder has no splits; leave split out")
        if self.path is not None and self.name == "shapes":
            raise ValueError("shapes is drawn, not read; leave path out")
        if self.path is None and self.name in ("folder", "imagefolder", "imagenet"):
            raise ValueError(f"{self.name} needs a path")
        return self


class Augmentation(Section):
    """What makes one view of an image; parameters follow torchvision's transforms."""

    crop_scale: Interval = Field((0.3, 1.0), description="share of the image's area that a crop covers")
    crop_ratio: Interval = Field((0.75, 4 / 3), description="aspect (width over height) of a crop")
    horizontal_flip: Unit = Field(0.5, description="probability of mirroring left to right")
    color_jitter: Unit = Field(
        0.0, description="strength s: brightness, contrast and saturation vary by a factor 1 - s to 1 + s"
    )
    hue_jitter: Annotated[Float, Field(ge=0, le=0.5)] | None = Field(
        None, description="largest turn of the hue, as a part of the circle; a quarter of color_jitter when not given"
    )
    color_jitter_probability: Unit = Field(0.8, description="probability that an image is jittered")
    grayscale: Unit = Field(0.0, description="probability of removing colour")
    gaussian_blur: Unit = Field(0.0, description="probability of blurring")
    blur_sigma: Interval = Field((0.1, 2.0), description="standard deviation of the blur in pixels")
    mean: tuple[Float, Float, Float] = Field((0.485, 0.456, 0.406), description="subtracted per channel, 0..1")
    std: tuple[Scale, Scale, Scale] = Field((0.229, 0.224, 0.225), description="divided by per channel, 0..1")

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must lie in (0, 1], got {list(self.crop_scale)}")
        if self.crop_ratio[0] <= 0:
            raise ValueError("crop_ratio must be positive")
        if self.blur_sigma[0] <= 0:
            raise ValueError("blur_sigma must be positive")
        return self


def folder_section(path: str) -> dict[str, Any]:
    """What `data: <path>` stands for: any nested folder of images."""
    return {"datasets": [{"name": "folder", "path": path}]}


class Data(Section):
    """Images: which, how many at once, how they are shown."""

    datasets: Annotated[tuple[Dataset, ...], Field(min_length=1)] = Field(
        (Dataset(name="shapes"),), description="sources of the mixture"
    )
    data_path: Str = Field("./data", description="folder for sources without a path of their own")
    download: Bool = Field(True, description="fetch cifar10, cifar100 and stl10 where they are missing")
    sampling_strategy: Literal["weighted", "balanced", "concat"] = Field(
        "concat", description="shares of the sources: their weights, equal, or by size"
    )
    epoch_size: Positive | None = Field(None, description="samples per epoch; the sum of the sources when not given")
    image_size: Positive = Field(224, description="side of a view in pixels")
    batch_size: Positive = Field(64, description="images per optimizer step, over all processes and accumulation")
    num_views: Annotated[Int, Field(ge=1, le=8)] = Field(1, description="augmented views of each image in a step")
    num_workers: Count = Field(0, description="loader processes; 0 loads in the training process")
    pin_memory: Bool = Field(True, description="page-locked batches where the device is cuda")
    decode_size: Positive | None = Field(
        None, description="side at which images of varying size are kept; image_size * 8/7 when not given"
    )
    cache_gb: Weight = Field(2.0, description="sources that fit in this much memory are decoded once and kept")
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        # `hjepa train data=./photos` is a whole config.
        return folder_section(value) if isinstance(value, str) else value


class Masking(Section):
    """Which patches are hidden (multi-block masking, Assran et al. 2023) and what is left to see."""

    num_masks: Annotated[Int, Field(ge=1, le=16)] = Field(4, description="hidden blocks per view, disjoint")
    mask_scale: Interval = Field((0.15, 0.2), description="share of the grid that one block covers")
    aspect_ratio: Interval = Field((0.75, 1.5), description="height over width of a block, in patches")
    context_scale: Interval = Field((1.0, 1.0), description="share of the remaining patches that the context sees")

    @model_validator(mode="after")
    def _check(self) -> Masking:
        if not 0 < self.mask_scale[0] <= self.mask_scale[1] < 1:
            raise ValueError(f"mask_scale must lie in (0, 1), got {list(self.mask_scale)}")
        if self.aspect_ratio[0] <= 0:
            raise ValueError("aspect_ratio must be positive")
        if not 0 < self.context_scale[0] <= self.context_scale[1] <= 1:
            raise ValueError(f"context_scale must lie in (0, 1], got {list(self.context_scale)}")
        return self


class VICReg(Section):
    """Variance, invariance, covariance (Bardes et al. 2022); used by loss.type: combined."""

    weight: Weight = Field(0.1, description="of the whole regulariser beside the prediction")
    invariance_weight: Weight = Field(25.0, description="of the distance between views of one image")
    variance_weight: Weight = Field(25.0, description="of the hinge on each dimension's standard deviation")
    covariance_weight: Weight = Field(1.0, description="of the off-diagonal covariance")


class SIGReg(Section):
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544); used by loss.type: sigreg."""

    weight: Weight = Field(1.0, description="of the image level (invariance and SIGReg) beside the prediction")
    mix: Unit = Field(0.05, description="lambda of the paper: (1 - mix) * invariance + mix * SIGReg")
    num_slices: Positive = Field(256, description="random directions, drawn anew each step")
    num_knots: Annotated[Int, Field(ge=3)] = Field(17, description="points of the quadrature")
    t_max: Scale = Field(3.0, description="end of the interval over which characteristic functions are compared")


class Loss(Section):
    """Distance of the prediction per level, and what keeps the embedding from collapsing."""

    type: Literal["mse", "smoothl1", "combined", "sigreg"] = Field(
        "smoothl1",
        description="mse, smoothl1: prediction only; combined: smoothl1 + VICReg; sigreg: smoothl1 + SIGReg",
    )
    hierarchy_weights: tuple[Weight, ...] | None = Field(
        None, description="one weight per level, finest first; 1, 1/2, 1/4, ... when not given"
    )
    smoothl1_beta: Scale = Field(1.0, description="where the smooth L1 distance turns from square to linear")
    vicreg: VICReg = VICReg()
    sigreg: SIGReg = SIGReg()


class Training(Section):
    """The loop."""

    epochs: Positive = Field(100, description="passes over an epoch's samples")
    max_steps: Positive | None = Field(
        None,
        description="cut the run short after this many optimizer steps; schedules stay those of `epochs`",
    )
    warmup_epochs: Weight | None = Field(
        None, description="epochs of linear learning-rate warm-up; 5 % of the run when not given"
    )
    lr: Scale = Field(5e-4, description="peak learning rate")
    min_lr: Weight = Field(1e-6, description="learning rate at the last step")
    weight_decay: Weight = Field(0.05, description="AdamW's decoupled decay; none on norms, biases, positions")
    betas: tuple[Annotated[Float, Field(ge=0, lt=1)], Annotated[Float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's averaging coefficients"
    )
    eps: Scale = Field(1e-8, description="AdamW's denominator offset")
    clip_grad: Scale | None = Field(1.0, description="largest norm of the gradient; null for none")
    accumulation_steps: Positive = Field(1, description="parts that a batch is computed in, one after another")
    use_amp: Bool = Field(False, description="bfloat16 autocast on the run's device")
    use_gradient_checkpointing: Bool = Field(
        False, description="recompute encoder and predictor blocks in the backward pass to save memory"
    )
    max_bad_steps: Positive = Field(20, description="steps in a row with a non-finite loss or gradient before stopping")


class Checkpoint(Section):
    """When the run is saved and how many saves are kept."""

    save_frequency: Count = Field(1, description="epochs between saves; 0 saves at the end only")
    save_frequency_steps: Count = Field(0, description="optimizer steps between saves; 0 for none")
    keep_last_k: Annotated[Int, Field(ge=2)] = Field(2, description="checkpoints kept, newest first")


class KNN(Section):
    """k nearest neighbours, cosine, weighted by exp(similarity / temperature) (Wu et al. 2018)."""

    k: Positive = Field(20, description="neighbours that vote")
    temperature: Scale = Field(0.07, description="of the weights")


class Evaluation(Section):
    """Probes of the frozen encoder, during the run and at its end."""

    eval_frequency: Count = Field(10, description="epochs between evaluations; 0 never, not even at the end")
    knn: KNN = KNN()
    linear: Bool = Field(True, description="linear probe beside k-NN")
    linear_l2: tuple[Scale, ...] = Field(
        (1e-3, 1e-2, 1e-1, 1.0, 10.0),
        description="grid of the linear probe's regularisation, chosen on a part of train",
    )
    max_train: Positive = Field(10000, description="labelled training images at most")
    max_test: Positive = Field(2000, description="test images at most")
    batch_size: Positive = Field(256, description="images per forward pass")


class Logging(Section):
    """What is written while the run goes on."""

    log_frequency: Positive = Field(10, description="optimizer steps between lines of metrics.jsonl")
    use_tensorboard: Bool = Field(True, description="curves in the run's tensorboard/ folder")


class Config(Section):
    """The whole of a run."""

    experiment: Experiment = Experiment()
    model: Model = Model()
    data: Data = Data()
    masking: Masking = Masking()
    loss: Loss = Loss()
    training: Training = Training()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto takes cuda, then mps, then cpu; a device asked for and absent is an error"
    )

    @model_validator(mode="after")
    def _cross(self) -> Config:
        cross_checks(self)
        return self
