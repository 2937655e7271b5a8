"""The encoder that is trained on what it sees of a view, and its slow average, which says what is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from hjepa.config.geometry import encoder_shape
from hjepa.config.model import Model
from hjepa.config.types import Switch
from hjepa.model.backbone import Backbone, Encoded, build_backbone


class ContextEncoder(nn.Module):
    """The encoder that is trained; it sees visible patches only."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, keep: Tensor | None = None, taps: Sequence[int] = ()) -> Encoded:
        """See `Backbone.forward`."""
        encoded: Encoded = self.backbone(images, keep, taps)
        return encoded


class TargetEncoder(nn.Module):
    """A slow average of the context encoder: no gradient, always in eval mode, sees the whole view."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> TargetEncoder:
        """Stay in eval mode whatever the model around it does."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, keep: Tensor | None = None, taps: Sequence[int] = ()) -> Encoded:
        """See `Backbone.forward`; nothing is recorded for a backward pass."""
        encoded: Encoded = self.backbone(images, keep, taps)
        return encoded

    @torch.no_grad()
    def copy_from_context_encoder(self, context: ContextEncoder) -> None:
        """Become equal to the context encoder."""
        self.backbone.load_state_dict(context.backbone.state_dict())

    @torch.no_grad()
    def update(self, context: ContextEncoder, momentum: float | Tensor) -> None:
        """target <- momentum * target + (1 - momentum) * context, in few calls for all parameters and without a sync.

        Args:
            context: the encoder to follow.
            momentum: in [0, 1], a number or a 0-d tensor on the parameters' device; at 1 nothing moves.
        """
        slow: list[Tensor] = list(self.backbone.parameters())
        fast: list[Tensor] = list(context.backbone.parameters())
        weight = 1.0 - torch.as_tensor(momentum, device=slow[0].device, dtype=slow[0].dtype)
        follow(slow, fast, weight, slow[0].is_cuda)


def follow(slow: list[Tensor], fast: list[Tensor], weight: Tensor, in_batches: bool) -> None:
    """slow <- slow + weight (fast - slow), in place.

    Args:
        slow, fast: tensors of equal shapes in pairs.
        weight: 0-d on their device, in [0, 1]; at 0 nothing moves.
        in_batches: three operations over all tensors in the place of one, in memory as large as they are. On CUDA each
            of the three is a few kernels; the one is a kernel per tensor where its weight lies on the device.
    """
    if in_batches:
        apart = torch._foreach_sub(fast, slow)
        torch._foreach_mul_(apart, weight)
        torch._foreach_add_(slow, apart)
    else:
        torch._foreach_lerp_(slow, fast, [weight] * len(slow))


def build_encoders(config: Model, image_size: int) -> tuple[ContextEncoder, TargetEncoder]:
    """Context encoder and its equal, the target encoder."""
    context = ContextEncoder(build_backbone(config, image_size))
    return context, TargetEncoder(deepcopy(context.backbone))


def create_encoder(
    encoder_type: str = "vit_base_patch16_224",
    img_size: int = 224,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    use_rope: bool = False,
    rope_theta: float = 10000.0,
    use_flash_attention: Switch = "auto",
    use_layerscale: bool = False,
    layerscale_init: float = 1e-5,
) -> tuple[ContextEncoder, TargetEncoder]:
    """Context and target encoder by plain arguments; each means what it means in the config's `model` section.

    Args:
        encoder_type: timm name.
        img_size: side of the (square) images in pixels, a multiple of the patch size.
        pretrained: start from timm's released weights.
        drop_path_rate: stochastic depth of the context encoder.
        use_rope: rotary positions.
        rope_theta: base of the rotary frequencies.
        use_flash_attention: fused attention, the explicit product, or what is faster.
        use_layerscale: learned per-channel scale on every residual branch.
        layerscale_init: its initial value.

    Raises:
        ValueError: for values that the config would refuse (pydantic's ValidationError is one).
    """
    config = Model.model_validate(
        {
            "encoder_type": encoder_type,
            "pretrained": pretrained,
            "drop_path_rate": drop_path_rate,
            "use_flash_attention": use_flash_attention,
            "use_layerscale": use_layerscale,
            "layerscale_init": layerscale_init,
            "rope": {"use_rope": use_rope, "theta": rope_theta},
        }
    )
    patch = encoder_shape(encoder_type).patch_size
    if img_size % patch:
        raise ValueError(f"img_size {img_size} is not a multiple of the patch size {patch}")
    return build_encoders(config, img_size)
