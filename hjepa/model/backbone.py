"""Vision Transformers from timm that run on any subset of an image's patches.

Hidden patches are dropped before the first block, not zeroed: the context encoder pays for what it sees, and
nothing leaks through attention. The blocks, their options and their initialisation are timm's; the adapter is what
embeds patches, drops some, and hands out the outputs of chosen blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa.config.geometry import EncoderShape
from hjepa.config.model import Model
from hjepa.config.types import Switch
from hjepa.errors import ConfigError, first_line
from hjepa.grid import Grid


class Encoded(NamedTuple):
    """What an encoder computed.

    Attributes:
        tokens: `[B, N, D]` output of the last block after the final norm.
        taps: `[B, N, D]` each, outputs of the blocks asked for, before any norm.
    """

    tokens: Tensor
    taps: tuple[Tensor, ...]


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens `[B, N, D]` at `[B, K]` -> `[B, K, D]`."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class Attention:
    """Which of timm's two ways a transformer computes attention: the fused kernel or the explicit product."""

    def __init__(self, module: nn.Module, use_fused: Switch) -> None:
        """Take charge of all attention layers in `module`."""
        self.layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "fused_attn")]
        self.use_fused = use_fused
        self._set(use_fused is not False)

    def choose(self, device: torch.device) -> None:
        """Under `auto`, what is faster on this device in the arithmetic of the moment.

        Torch's fused kernel for CPUs is 1.7 to 6.8 times slower than the explicit product in bfloat16, forward and
        backward, and a little faster in float32 (`docs/performance.md`).
        """
        if self.use_fused == "auto":
            self._set(not (device.type == "cpu" and torch.is_autocast_enabled("cpu")))

    def _set(self, fused: bool) -> None:
        for layer in self.layers:
            layer.fused_attn = fused


class Backbone(nn.Module, ABC):
    """A timm transformer without class token, and how its patches and positions are embedded."""

    vit: Any  # timm publishes no types

    def __init__(self, vit: nn.Module, use_flash_attention: Switch) -> None:
        super().__init__()
        self.vit = vit
        self.checkpointing = False
        self.attention = Attention(vit, use_flash_attention)
        vit.patch_embed.strict_img_size = False  # type: ignore[union-attr]  # local crops are smaller

    @property
    def grid(self) -> Grid:
        """The patches of a whole image."""
        return Grid(*self.vit.patch_embed.grid_size)

    def grid_of(self, images: Tensor) -> Grid:
        """The patches of these images `[B, 3, H, W]`, which may be smaller than a whole view."""
        height, width = self.vit.patch_embed.patch_size
        assert images.shape[2] % height == images.shape[3] % width == 0
        return Grid(images.shape[2] // height, images.shape[3] // width)

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""
        return int(self.vit.embed_dim)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def last_block(self) -> nn.Module:
        """The one whose output is the embedding."""
        block: nn.Module = self.vit.blocks[-1]
        return block

    @abstractmethod
    def embed(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patches to tokens.

        Args:
            images: `[B, 3, H, W]`.
            keep: `[B, K]` patch numbers to keep, or None for all.

        Returns:
            tokens `[B, K, D]` and what every block needs to know of their places, if anything.
        """

    @abstractmethod
    def block(self, index: int, tokens: Tensor, places: Tensor | None) -> Tensor:
        """One block: `[B, K, D]` -> `[B, K, D]`."""

    def forward(self, images: Tensor, keep: Tensor | None = None, taps: Sequence[int] = ()) -> Encoded:
        """Encode the kept patches.

        Args:
            images: `[B, 3, H, W]` normalised.
            keep: `[B, K]` int64 patch numbers, or None for the whole grid.
            taps: blocks (1 = first) whose outputs are wanted.
        """
        self.attention.choose(images.device)
        tokens, places = self.embed(images, keep)
        tapped = {}
        for index in range(self.depth):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.block, index, tokens, places, use_reentrant=False)
            else:
                tokens = self.block(index, tokens, places)
            if index + 1 in taps:
                tapped[index + 1] = tokens
        return Encoded(self.vit.norm(tokens), tuple(tapped[tap] for tap in taps))


class ViTBackbone(Backbone):
    """Learned absolute positions, resampled for images of another size."""

    def embed(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.embed`; positions are added before patches are dropped."""
        positions = self.vit.pos_embed
        size = self.grid_of(images)
        if size != self.grid:
            whole = [self.grid.height, self.grid.width]
            positions = resample_abs_pos_embed(positions, [size.height, size.width], whole, num_prefix_tokens=0)
        tokens = self.vit.patch_embed(images) + positions
        return (tokens if keep is None else take(tokens, keep)), None

    def block(self, index: int, tokens: Tensor, places: Tensor | None) -> Tensor:
        """See `Backbone.block`."""
        out: Tensor = self.vit.blocks[index](tokens)
        return out


class RotaryBackbone(Backbone):
    """Rotary positions: each block rotates queries and keys by the places of the kept patches."""

    def embed(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.embed`; places are `[N, 2 d]` or, of kept patches, `[B, 1, K, 2 d]` (d: head width)."""
        tokens = self.vit.patch_embed(images)
        size = self.grid_of(images)
        places = self.vit.rope.get_embed()
        if size != self.grid:
            # Rotary places are relative: a crop may lie in any corner of the grid.
            whole = places.unflatten(0, (self.grid.height, self.grid.width))
            places = whole[: size.height, : size.width].flatten(0, 1)
        if keep is None:
            return tokens, places
        return take(tokens, keep), places[keep].unsqueeze(1)

    def block(self, index: int, tokens: Tensor, places: Tensor | None) -> Tensor:
        """See `Backbone.block`."""
        out: Tensor = self.vit.blocks[index](tokens, rope=places)
        return out


def build_backbone(config: Model, image_size: int) -> Backbone:
    """The transformer that a config describes, for square images of `image_size` pixels."""
    shape = config.shape
    init_values = config.layerscale_init if config.use_layerscale else None
    if config.rope.use_rope:
        rotary = Eva(
            img_size=image_size,
            patch_size=shape.patch_size,
            num_classes=0,
            global_pool="avg",
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            attn_type="rope",
            init_values=init_values,
            drop_path_rate=config.drop_path_rate,
            class_token=False,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_temperature=config.rope.theta,
            use_post_transformer_norm=True,
            use_fc_norm=False,
        )
        return RotaryBackbone(rotary, config.use_flash_attention)
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=shape.patch_size,
        num_classes=0,
        global_pool="avg",
        fc_norm=False,
        class_token=False,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        init_values=init_values,
        drop_path_rate=config.drop_path_rate,
    )
    if config.pretrained is True:
        adopt_weights(vit, _released_model(config.encoder_type, image_size, shape))
    return ViTBackbone(vit, config.use_flash_attention)


def _released_model(encoder_type: str, image_size: int, shape: EncoderShape) -> nn.Module:
    """timm's model with its released weights, resampled to this image and patch size."""
    try:
        model: nn.Module = timm.create_model(
            encoder_type, pretrained=True, img_size=image_size, patch_size=shape.patch_size, num_classes=0
        )
    except Exception as error:  # hub, network and file errors have no common class
        reason = first_line(error)
        raise ConfigError(
            f"model.pretrained: timm could not supply weights for {encoder_type} ({reason}); "
            "connect once to download them, or set model.pretrained=false"
        ) from error
    return model


def adopt_weights(vit: VisionTransformer, donor: nn.Module) -> None:
    """Copy a timm ViT's weights into one without class token; the class token and its position are left behind."""
    state = donor.state_dict()
    if state.pop("cls_token", None) is not None:
        state["pos_embed"] = state["pos_embed"][:, 1:]
    vit.load_state_dict(state)
