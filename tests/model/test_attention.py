"""Fused attention computes what the explicit product does, forward and backward, and `auto` knows when to use which."""

import pytest
import torch
from torch import Tensor

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.memory import synthetic_batch
from hjepa.objective import Objective

KINDS = [
    ("model.rope.use_rope=false", "model.predictor.attention=self"),
    ("model.rope.use_rope=true", "model.predictor.attention=self"),
    ("model.rope.use_rope=false", "model.predictor.attention=cross"),
]


def gradients(small: tuple[str, ...], *words: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a random batch, in float64, where the order of summation does not show."""
    config = load_config(None, [*small, *words, "loss.type=sigreg", "data.num_views=2", "model.predictor.depth=2"])
    model = create_hjepa_from_config(config).double().train()
    images, masks, _ = synthetic_batch(config, 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    output = model(torch.randn(images.shape, generator=generator, dtype=torch.float64), masks)
    loss = Objective(config.loss, config.model.num_hierarchies, model.taps)(output, 0).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_explicit_agree(small: tuple[str, ...], kind: tuple[str, str]) -> None:
    fused, explicit = (gradients(small, *kind, f"model.use_flash_attention={word}") for word in ("true", "false"))
    torch.testing.assert_close(fused[0], explicit[0], rtol=1e-6, atol=1e-6)
    assert fused[1].keys() == explicit[1].keys()
    for name, gradient in fused[1].items():
        torch.testing.assert_close(gradient, explicit[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_gradients(small: tuple[str, ...], kind: tuple[str, str]) -> None:
    plain, again = (gradients(small, *kind, f"training.use_gradient_checkpointing={w}") for w in ("false", "true"))
    for name, gradient in plain[1].items():
        torch.testing.assert_close(gradient, again[1][name], rtol=1e-6, atol=1e-9)


def test_auto_follows_the_arithmetic_of_the_moment(small: tuple[str, ...]) -> None:
    model = create_hjepa_from_config(load_config(None, [*small, "model.use_flash_attention=auto"]))
    backbone = model.context_encoder.backbone
    images = torch.randn(2, 3, 64, 64)
    for amp in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            backbone(images)
        assert {block.attn.fused_attn for block in backbone.vit.blocks} == {not amp}
