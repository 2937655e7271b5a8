"""The sections of the config beside `model` and `data`: masks, loss, loop, and what a run leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hjepa.config.types import (
    Blocks,
    Bool,
    Conflict,
    Count,
    Duration,
    Int,
    Positive,
    Rate,
    Ratio,
    Scale,
    Section,
    Share,
    Str,
    Switch,
    Unit,
    Weight,
    Width,
    seconds_of,
)


class Experiment(Section):
    """What the run is called, where it is kept and what it draws its randomness from."""

    name: Annotated[Str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "hjepa", description="name of the run; letters, digits, dot, dash, underscore"
    )
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = Field(
        42, description="seed of weights, sample order, augmentation and masks"
    )
    output_dir: Str | None = Field(None, description="folder of the run; runs/<name> when not given")


class Masking(Section):
    """Which patches are hidden (multi-block masking, Assran et al. 2023) and what is left to see."""

    num_masks: Annotated[Int, Field(ge=0, le=16)] = Field(
        4, description="hidden blocks per view, which may overlap; 0 hides nothing, for the image level alone"
    )
    mask_scale: Share = Field((0.15, 0.2), description="share of the grid that one block covers")
    aspect_ratio: Ratio = Field((0.75, 1.5), description="height over width of a block, in patches")
    context_scale: Share = Field((1.0, 1.0), description="share of the remaining patches that the context sees")

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        if self.mask_scale[1] == 1:
            yield Conflict(("mask_scale",), "a block of the whole grid leaves nothing to see; at most 0.9, say")


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
    num_slices: Width = Field(256, description="random directions, drawn anew each step")
    num_knots: Annotated[Int, Field(ge=3, le=10001)] = Field(17, description="points of the quadrature")
    t_max: Scale = Field(3.0, description="end of the interval over which characteristic functions are compared")


class Loss(Section):
    """Distance of the prediction per level, and what keeps the embedding from collapsing."""

    type: Literal["mse", "smoothl1", "combined", "sigreg"] = Field(
        "smoothl1",
        description="mse, smoothl1: prediction only; combined: smoothl1 + VICReg; sigreg: smoothl1 + SIGReg",
    )
    hierarchy_weights: tuple[Weight, ...] | None = Field(
        None, description="one weight per level, finest first; 1, 1/2, 1/4, ... when not given; all 0: no prediction"
    )
    predict_every: Positive = Field(
        1, description="predict every n-th image of a batch only, which saves its target pass; the image level sees all"
    )
    smoothl1_beta: Scale = Field(1.0, description="where the smooth L1 distance turns from square to linear")
    vicreg: VICReg = VICReg()
    sigreg: SIGReg = SIGReg()

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        if self.predict_every > 1 and not self.has_image_level:
            yield Conflict(
                ("predict_every", "type"),
                f"{self.type} has no image level, so images that are not predicted teach nothing; set it to 1",
            )

    @property
    def has_image_level(self) -> bool:
        """Whether pooled embeddings of views are compared, so that the model needs a projector."""
        return self.type in ("combined", "sigreg")

    @property
    def predicts(self) -> bool:
        """Whether any level is predicted, so that the model needs a predictor and targets."""
        return self.hierarchy_weights is None or any(self.hierarchy_weights)


class Training(Section):
    """The loop."""

    epochs: Positive | None = Field(100, description="passes over an epoch's samples; null: as many as max_time allows")
    max_time: Duration | None = Field(
        None,
        description="time for the whole run, such as 8h or 1h30m: the first steps are timed, and where epochs would "
        "take longer the schedules are fitted to fewer steps",
    )
    max_steps: Positive | None = Field(
        None,
        description="cut the run short after this many optimizer steps; schedules stay those of `epochs`",
    )
    warmup_epochs: Weight | None = Field(
        None, description="epochs of linear learning-rate warm-up; 5 % of the run when not given"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon: orthogonalised momentum for the matrices of transformer blocks (larger steps: lr "
        "3e-3 to 1e-2), AdamW for the rest",
    )
    muon_momentum: Rate = Field(0.95, description="Muon's averaging coefficient")
    lr: Scale = Field(5e-4, description="peak learning rate")
    warmup_lr: Weight = Field(0.0, description="learning rate from which the warm-up rises")
    min_lr: Weight = Field(1e-6, description="learning rate at the last step")
    weight_decay: Weight = Field(0.05, description="AdamW's decoupled decay; none on norms, biases, positions")
    betas: tuple[Rate, Rate] = Field((0.9, 0.95), description="AdamW's averaging coefficients")
    eps: Scale = Field(1e-8, description="AdamW's denominator offset")
    clip_grad: Scale | None = Field(1.0, description="largest norm of the gradient; null for none")
    accumulation_steps: Positive = Field(1, description="parts that a batch is computed in, one after another")
    use_amp: Switch = Field(
        False, description="bfloat16 autocast on the run's device; auto: where that is faster (not on mps)"
    )
    use_gradient_checkpointing: Blocks = Field(
        False, description="recompute blocks of encoder, predictor or both (true) in the backward pass to save memory"
    )
    use_compile: bool = Field(
        False,
        description="compile transformer blocks (torch.compile; not on mps): the first steps take a minute more or "
        "longer, and `hjepa check` says what the others gain",
    )
    max_bad_steps: Positive = Field(
        20, description="steps in a row with a non-finite loss or gradient (each left out) that count as diverged"
    )
    on_divergence: Literal["stop", "rollback"] = Field(
        "stop",
        description="stop with exit code 4, or rollback: back to the checkpoint before, going on after the batches "
        "since, at most three times; a loss that stays above three times its recent median counts as diverged, too",
    )

    @property
    def seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else seconds_of(self.max_time)

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        if self.epochs is None and self.max_time is None:
            yield Conflict(("epochs", "max_time"), "null needs a limit; set training.max_time, such as 8h")
        if self.epochs is not None and self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            yield Conflict(
                ("warmup_epochs", "epochs"),
                f"{self.warmup_epochs:g} leaves nothing of {self.epochs} epochs; at most {self.epochs - 1}",
            )
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                yield Conflict((name, "lr"), f"{getattr(self, name):g} is above training.lr {self.lr:g}; lower it")


class Checkpoint(Section):
    """When the run is saved and how many saves are kept."""

    save_frequency: Count = Field(1, description="epochs between saves; 0 saves at the end only")
    save_frequency_steps: Count = Field(0, description="optimizer steps between saves; 0 for none")
    keep_last_k: Annotated[Int, Field(ge=2)] = Field(2, description="checkpoints kept, newest first")
    metric: Literal["knn", "linear", "loss"] | None = Field(
        None,
        description="keep the best checkpoint apart: by the probe at each evaluation, or the mean loss of each epoch",
    )

    @property
    def needs_labels(self) -> bool:
        """Whether the best checkpoint is found by probes."""
        return self.metric in ("knn", "linear")


class KNN(Section):
    """k nearest neighbours, cosine, weighted by exp(similarity / temperature) (Wu et al. 2018)."""

    k: Positive = Field(20, description="neighbours that vote")
    temperature: Scale = Field(0.07, description="of the weights")


class Evaluation(Section):
    """Probes of the frozen encoder, during the run and at its end."""

    eval_frequency: Count = Field(10, description="epochs between evaluations; 0 never, not even at the end")
    knn: KNN = KNN()
    linear: Bool = Field(True, description="linear probe beside k-NN")
    linear_l2: Annotated[tuple[Scale, ...], Field(min_length=1)] = Field(
        (1e-3, 1e-2, 1e-1, 1.0, 10.0),
        description="grid of the linear probe's regularisation, chosen on a part of train",
    )
    dense: Bool = Field(True, description="linear probe of single patches, where a source has masks (shapes)")
    max_train: Positive = Field(10000, description="labelled training images at most")
    max_test: Positive = Field(2000, description="test images at most")
    batch_size: Positive = Field(256, description="images per forward pass")


class WandB(Section):
    """The same curves at Weights & Biases, where its package is installed (`pip install hjepa[wandb]`)."""

    enabled: Bool = Field(False, description="send metrics to Weights & Biases; WANDB_MODE=offline keeps them here")
    project: Str = Field("hjepa", description="project there")
    tags: tuple[Str, ...] = Field((), description="tags of the run there")


class Logging(Section):
    """What is written while the run goes on."""

    log_frequency: Positive = Field(10, description="optimizer steps between lines of metrics.jsonl")
    use_tensorboard: Bool = Field(True, description="curves in the run's tensorboard/ folder")
    use_report: Bool = Field(True, description="a page about the run, report.html, when it has finished")
    use_pictures: Bool = Field(
        False,
        description="the page's pictures (views with masks, features as colours) beside the curves, at each evaluation",
    )
    wandb: WandB = WandB()

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        if self.use_pictures and not (self.use_tensorboard or self.wandb.enabled):
            yield Conflict(
                ("use_pictures", "use_tensorboard", "wandb.enabled"),
                "pictures go where curves go, and there are none; set logging.use_tensorboard=true, or leave them out",
            )
