"""The `model` section: encoder, predictor and their options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hjepa.config.geometry import ENCODERS, OWN_SHAPE, EncoderShape, encoder_shape, nearest_divisor
from hjepa.config.types import (
    AsFloat,
    Bool,
    Conflict,
    Depth,
    Int,
    Pixels,
    Positive,
    Rate,
    Released,
    Scale,
    Section,
    Switch,
    Unit,
    Weight,
    Width,
)


class Rope(Section):
    """Rotary position embedding (Su et al. 2021, axial in two dimensions)."""

    use_rope: Bool = Field(False, description="rotary positions in place of learned absolute ones")
    theta: Annotated[float, Field(gt=1), AsFloat] = Field(10000.0, description="base of the rotary frequencies")


class FPN(Section):
    """Top-down path among the predicted levels (Lin et al. 2017)."""

    use_fpn: Bool = Field(False, description="fuse each coarse prediction into the next finer one")
    feature_dim: Width | None = Field(
        None, description="channels of the top-down path; the predictor's width when not given"
    )
    fusion_method: Literal["add", "concat"] = Field("add", description="how two levels are fused")


class Predictor(Section):
    """The narrow transformer that says what the target encoder would have computed."""

    embed_dim: Width | None = Field(None, description="width; half the encoder's when not given")
    depth: Depth = Field(4, description="number of blocks")
    num_heads: Width | None = Field(None, description="attention heads; the encoder's head width when not given")
    mlp_ratio: Annotated[float, Field(gt=0, le=64), AsFloat] = Field(
        4.0, description="hidden width of the MLP as a multiple of the width"
    )
    attention: Literal["self", "cross"] = Field(
        "self",
        description="self: context and queries attend to each other; cross: queries attend to the context alone",
    )


class EMA(Section):
    """The target encoder as a slow average of the context encoder.

    Momentum rises from `momentum` to `momentum_end` along a half cosine over the run. Left out, both follow the
    length of the run: an average over 1 % of the steps at first, over 10 % at the end.
    """

    momentum: Rate | None = Field(None, description="momentum at the first step; 1 - 100/steps when not given")
    momentum_end: Unit | None = Field(None, description="momentum at the last step; 1 - 10/steps when not given")
    momentum_warmup_epochs: Weight = Field(
        0.0, description="epochs over which the averaging horizon grows from one step to its scheduled length"
    )


class Projector(Section):
    """MLP between the pooled embedding and the image-level loss; not part of the exported encoder."""

    depth: Annotated[Int, Field(ge=0, le=16)] = Field(2, description="hidden layers; 0 is a linear map")
    hidden_dim: Width = Field(512, description="width of the hidden layers")
    output_dim: Annotated[Int, Field(ge=2, le=1 << 16)] = Field(
        64, description="width of the embedding that is regularised"
    )


class Model(Section):
    """Encoder, predictor and their options."""

    encoder_type: Literal[tuple(ENCODERS)] | Literal["vit"] = Field(  # type: ignore[valid-type]
        "vit_small_patch16_224",
        description="timm name of the encoder; vit takes its shape from patch_size, embed_dim, depth and num_heads",
    )
    patch_size: Pixels | None = Field(None, description="patch side in pixels; the name's when not given")
    embed_dim: Width | None = Field(None, description="encoder width; the name's when not given")
    depth: Depth | None = Field(None, description="encoder blocks; the name's when not given")
    num_heads: Width | None = Field(None, description="encoder attention heads; the name's when not given")
    whiten_patches: Bool = Field(
        False, description="patch filters start as random directions of the data's whitened patches"
    )
    pretrained: Released = Field(
        False,
        description="start from timm's released weights of encoder_type, or from a file (timm, I-JEPA) or a run",
    )
    drop_path_rate: Rate = Field(
        0.0, description="stochastic depth of the context encoder, growing linearly to this rate"
    )
    use_flash_attention: Switch = Field(
        "auto",
        description="fused attention; off computes the explicit product; auto does so for bfloat16 (use_amp) on a CPU",
    )
    use_layerscale: Bool = Field(False, description="learned per-channel scale on every residual branch")
    layerscale_init: Scale = Field(1e-5, description="initial value of that scale")
    num_hierarchies: Annotated[Int, Field(ge=1, le=4)] = Field(
        2, description="number of levels; level l predicts means over 2^l x 2^l patches"
    )
    target_layers: tuple[Positive, ...] | None = Field(
        None,
        description="encoder blocks (1 = first) whose output is predicted; three spread over the depth when not given",
    )
    use_target_encoder: Bool = Field(
        True, description="predict what a slow average of the encoder computes; off: what the encoder itself computes"
    )
    use_weight_average: Bool = Field(
        False,
        description="without target encoder: keep the slow average (model.ema) all the same, for evaluation only",
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

    def conflicts(self) -> Iterator[Conflict]:
        """See `Section.conflicts`."""
        stated = {name: getattr(self, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
        if self.encoder_type == OWN_SHAPE:
            missing = [name for name, value in stated.items() if value is None]
            if missing:
                yield Conflict(("encoder_type", *missing), f"vit has no shape of its own; give {', '.join(missing)}")
                return
        else:
            named = ENCODERS[self.encoder_type]
            other = [n for n in ("embed_dim", "depth", "num_heads") if stated[n] not in (None, getattr(named, n))]
            for name in other:
                yield Conflict(
                    (name, "encoder_type"),
                    f"{stated[name]} is not {self.encoder_type}'s {getattr(named, name)}; leave it out, or set "
                    "encoder_type=vit for a shape of your own",
                )
            if other:
                return
        shape = self.shape
        rotary = self.rope.use_rope
        if shape.embed_dim % shape.num_heads:
            yield Conflict(
                ("embed_dim", "num_heads"),
                f"{shape.embed_dim} is not a multiple of num_heads {shape.num_heads}; try {shape.fitting(rotary)}",
            )
        elif rotary and (shape.embed_dim // shape.num_heads) % 4:
            yield Conflict(
                ("rope.use_rope", "embed_dim", "num_heads"),
                f"rotary positions need a head width that is a multiple of 4, got {shape.embed_dim // shape.num_heads}"
                f" ({shape.embed_dim}/{shape.num_heads}); try {shape.fitting(rotary)}",
            )
        if self.pretrained and self.whiten_patches:
            reason = "it would replace the filters that training starts from; set it to false"
            yield Conflict(("whiten_patches", "pretrained"), f"excluded by pretrained: {reason}")
        if self.pretrained is True:
            for wrong, key, reason in (
                (self.encoder_type == OWN_SHAPE, "encoder_type", "no weights were released for it; choose a timm name"),
                (self.rope.use_rope, "rope.use_rope", "the released weights have learned positions; set it to false"),
                (self.use_layerscale, "use_layerscale", "the released weights have none; set it to false"),
            ):
                if wrong:
                    yield Conflict((key, "pretrained"), f"excluded by pretrained: {reason}")
        if self.target_layers is not None:
            if list(self.target_layers) != sorted(set(self.target_layers)) or not self.target_layers:
                yield Conflict(("target_layers",), "blocks must be distinct, ascending and at least one")
            elif self.target_layers[-1] > shape.depth:
                yield Conflict(
                    ("target_layers", "depth"),
                    f"names block {self.target_layers[-1]} of {shape.depth}; the last is {shape.depth}",
                )
        width = self.predictor.embed_dim or shape.embed_dim // 2
        if width % 4 == 0 and self.predictor.num_heads and width % self.predictor.num_heads:
            yield Conflict(
                ("predictor.num_heads", "predictor.embed_dim"),
                f"{self.predictor.num_heads} does not divide the predictor's width {width}; "
                f"try {nearest_divisor(width, self.predictor.num_heads)}",
            )
        if width % 4:
            yield Conflict(
                ("predictor.embed_dim", "embed_dim"),
                f"{width} is not a multiple of 4 (sine positions); try {max(4, width // 4 * 4)}",
            )
