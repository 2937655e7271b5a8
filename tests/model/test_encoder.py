import inspect
import re

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hjepa.config.geometry import ENCODERS
from hjepa.config.model import Model
from hjepa.errors import ConfigError
from hjepa.model.backbone import adopt_weights, build_backbone
from hjepa.model.encoder import ContextEncoder, TargetEncoder, build_encoders, create_encoder

TINY = {"encoder_type": "vit", "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ROTARY = {"rope": {"use_rope": True}}
kinds = pytest.mark.parametrize("extra", [{}, ROTARY], ids=["vit", "rotary"])


def model(**extra: object) -> Model:
    return Model.model_validate(TINY | extra)


def images(count: int = 4, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_table_of_encoders_is_timms() -> None:
    for name, shape in ENCODERS.items():
        source = inspect.getsource(timm.model_entrypoint(name))
        args = dict(re.findall(r"(\w+)=(\d+)", source))
        assert int(args["patch_size"]) == shape.patch_size
        assert (int(args["embed_dim"]), int(args["depth"]), int(args["num_heads"])) == (
            shape.embed_dim,
            shape.depth,
            shape.num_heads,
        )


@kinds
@pytest.mark.parametrize("scale", [{}, {"use_layerscale": True, "layerscale_init": 0.5}])
def test_without_a_mask_it_is_exactly_timm(extra: dict[str, object], scale: dict[str, object]) -> None:
    backbone = build_backbone(model(**extra, **scale), 32).eval()
    torch.testing.assert_close(backbone(images()).tokens, backbone.vit.forward_features(images()), rtol=0, atol=0)


@kinds
def test_keeping_all_patches_in_any_order_changes_nothing_but_the_order(extra: dict[str, object]) -> None:
    backbone = build_backbone(model(**extra), 32).eval()
    whole = backbone(images()).tokens
    order = torch.stack([torch.randperm(16) for _ in range(4)])
    shuffled = backbone(images(), keep=order).tokens
    torch.testing.assert_close(shuffled, whole.gather(1, order[..., None].expand(-1, -1, 32)), rtol=1e-4, atol=1e-5)


@kinds
def test_hidden_pixels_do_not_reach_the_context(extra: dict[str, object]) -> None:
    backbone = build_backbone(model(**extra), 32).eval()
    keep = torch.tensor([[0, 5]]).expand(4, -1)
    x = images()
    changed = x.clone()
    changed[:, :, 8:, 16:] += 1  # patches 6, 7, 10, ...: neither 0 nor 5
    torch.testing.assert_close(backbone(x, keep=keep).tokens, backbone(changed, keep=keep).tokens, rtol=0, atol=0)
    changed[:, :, :8, :8] += 1
    assert not torch.allclose(backbone(x, keep=keep).tokens, backbone(changed, keep=keep).tokens)


@kinds
def test_positions_follow_the_kept_patches(extra: dict[str, object]) -> None:
    backbone = build_backbone(model(**extra), 32).eval()
    x = images()
    x[:, :, 24:, 24:] = x[:, :, :8, 8:16]  # patches 1 and 15 look the same: only their places tell them apart
    near, far = (backbone(x, keep=torch.tensor([keep]).expand(4, -1)).tokens for keep in ([0, 1], [0, 15]))
    assert (near[:, 0] - far[:, 0]).abs().max() > 1e-6


def test_rotary_sees_relative_places_and_theta_scales_them() -> None:
    backbone = build_backbone(model(**ROTARY), 32).eval()
    x = images()
    x[:, :, 16:24, 16:] = x[:, :, :8, :16]  # patches 10 and 11 show what 0 and 1 show
    here, there = (backbone(x, keep=torch.tensor([keep]).expand(4, -1)).tokens for keep in ([0, 1], [10, 11]))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    one = build_backbone(model(rope={"use_rope": True, "theta": 100.0}), 32).eval()
    torch.manual_seed(0)
    other = build_backbone(model(rope={"use_rope": True, "theta": 10000.0}), 32).eval()
    assert (one(images()).tokens - other(images()).tokens).abs().max() > 1e-6


@kinds
def test_flash_attention_equals_the_explicit_product(extra: dict[str, object]) -> None:
    torch.manual_seed(0)
    fused = build_backbone(model(**extra), 32)
    torch.manual_seed(0)
    plain = build_backbone(model(**extra, use_flash_attention=False), 32)
    calls: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(True)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        a = fused(images()).tokens
        assert len(calls) == 3
        b = plain(images()).tokens
        assert len(calls) == 3
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for encoder, tokens in ((fused, a), (plain, b)):
        encoder.zero_grad()
        tokens.square().mean().backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)


@kinds
def test_checkpointing_saves_activations_and_keeps_gradients(extra: dict[str, object]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(model(**extra, drop_path_rate=0.3), 32).train()
    gradients, saved = [], []
    for enabled in (False, True):
        backbone.checkpointing = enabled
        backbone.zero_grad()
        torch.manual_seed(1)  # the same paths are dropped, and again in the recomputation
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = backbone(images()).tokens.square().mean()
        loss.backward()
        saved.append(count)
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert saved[1] < 0.5 * saved[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_layerscale_starts_at_its_value_and_is_absent_without() -> None:
    for extra in ({}, ROTARY):
        backbone = build_backbone(model(use_layerscale=True, layerscale_init=0.125, **extra), 32)
        scales = [p for name, p in backbone.named_parameters() if "gamma" in name]
        assert len(scales) == 6
        assert all((p == 0.125).all() for p in scales)
        assert not any("gamma" in name for name, _ in build_backbone(model(**extra), 32).named_parameters())


def test_drop_path_acts_in_training_only() -> None:
    context, target = build_encoders(model(drop_path_rate=0.5), 32)
    context.train()
    torch.manual_seed(0)
    assert (context(images()).tokens - context(images()).tokens).abs().max() > 0
    assert (target(images()).tokens - target(images()).tokens).abs().max() == 0


@kinds
def test_the_target_is_born_equal_and_moves_only_when_told(extra: dict[str, object]) -> None:
    context, target = build_encoders(model(**extra), 32)
    assert isinstance(context, ContextEncoder)
    assert isinstance(target, TargetEncoder)
    torch.testing.assert_close(context(images()).tokens, target(images()).tokens, rtol=0, atol=0)
    target.train()
    assert not target.training
    assert not target.backbone.training
    assert not any(p.requires_grad for p in target.parameters())
    assert not target(images()).tokens.requires_grad

    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in context.parameters():
            p.add_(1.0)
    for p, old in zip(target.parameters(), before, strict=True):
        assert torch.equal(p, old)
    target.update(context, 1.0)
    for p, old in zip(target.parameters(), before, strict=True):
        assert torch.equal(p, old)
    target.update(context, 0.75)
    for p, old in zip(target.parameters(), before, strict=True):
        torch.testing.assert_close(p, old + 0.25)
    target.copy_from_context_encoder(context)
    for p, q in zip(target.parameters(), context.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()


def test_taps_are_the_outputs_of_the_blocks_named() -> None:
    backbone = build_backbone(model(), 32).eval()
    encoded = backbone(images(), taps=(1, 3))
    tokens, places = backbone.embed(images(), None)
    first = backbone.block(0, tokens, places)
    torch.testing.assert_close(encoded.taps[0], first)
    torch.testing.assert_close(backbone.vit.norm(encoded.taps[1]), encoded.tokens)


@pytest.mark.parametrize(("side", "patch"), [(32, 4), (96, 8), (224, 16), (56, 14), (49, 7)])
@kinds
def test_any_size_that_the_patch_divides(side: int, patch: int, extra: dict[str, object]) -> None:
    backbone = build_backbone(model(**extra, patch_size=patch), side)
    assert backbone(torch.zeros(1, 3, side, side)).tokens.shape == (1, (side // patch) ** 2, 32)
    assert backbone.grid.size == (side // patch) ** 2


@kinds
@pytest.mark.parametrize("side", [8, 24, 32])
def test_images_of_another_size_have_a_grid_of_their_own(side: int, extra: dict[str, object]) -> None:
    backbone = build_backbone(model(**extra), 32).eval()
    assert backbone.grid_of(images(side=side)).size == (side // 8) ** 2
    assert backbone(images(side=side)).tokens.shape == (4, (side // 8) ** 2, 32)
    kept = backbone(images(side=side), keep=torch.zeros(4, 1, dtype=torch.int64)).tokens
    assert kept.shape == (4, 1, 32)


def test_learned_positions_are_resampled_for_another_grid() -> None:
    backbone = build_backbone(model(), 32).eval()
    plane = torch.linspace(0, 1, 4)[:, None].expand(4, 4)  # a slope from the top row to the bottom row
    with torch.no_grad():
        backbone.vit.pos_embed.copy_(plane.reshape(1, 16, 1).expand(-1, -1, 32))
        places = backbone.embed(torch.zeros(1, 3, 16, 16), None)[0] - backbone.vit.patch_embed(
            torch.zeros(1, 3, 16, 16)
        )
        same = backbone.embed(torch.zeros(1, 3, 32, 32), None)[0] - backbone.vit.patch_embed(torch.zeros(1, 3, 32, 32))
    rows = places[0, :, 0].view(2, 2)
    torch.testing.assert_close(rows[:, 0], rows[:, 1])
    assert 0 < rows[0, 0] < 0.5 < rows[1, 0] < 1
    torch.testing.assert_close(rows.mean(), torch.tensor(0.5))
    torch.testing.assert_close(same[0, :, 0], plane.flatten())


def test_rotary_places_of_a_small_image_are_those_of_its_own_grid() -> None:
    small, whole = build_backbone(model(**ROTARY), 16).eval(), build_backbone(model(**ROTARY), 32).eval()
    whole.load_state_dict(small.state_dict())
    torch.testing.assert_close(small(images(side=16)).tokens, whole(images(side=16)).tokens, rtol=1e-4, atol=1e-5)


class TestCreateEncoder:
    """The signature that the first project's users know; there, three of these arguments crashed."""

    def test_every_argument_arrives(self) -> None:
        context, target = create_encoder(
            encoder_type="vit_tiny_patch16_224",
            img_size=48,
            pretrained=False,
            drop_path_rate=0.1,
            use_rope=True,
            rope_theta=100.0,
            use_flash_attention=False,
            use_layerscale=True,
            layerscale_init=1e-3,
        )
        vit = context.backbone.vit
        assert context.backbone.grid.size == 9
        assert vit.rope.temperature == 100.0
        assert not vit.blocks[0].attn.fused_attn
        assert (vit.blocks[3].gamma_1 == 1e-3).all()
        assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
        assert target(torch.zeros(1, 3, 48, 48)).tokens.shape == (1, 9, 192)

    def test_what_cannot_be_is_refused(self) -> None:
        with pytest.raises(ValueError, match="img_size 50 is not a multiple of the patch size 16"):
            create_encoder("vit_tiny_patch16_224", img_size=50)
        with pytest.raises(ValueError, match="encoder_type"):
            create_encoder("vit_gigantic")


def test_released_weights_are_adopted_without_the_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    donor = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0)
    asked: dict[str, object] = {}

    def create(name: str, **kwargs: object) -> torch.nn.Module:
        asked.update(kwargs, name=name)
        return donor

    monkeypatch.setattr("hjepa.model.backbone.timm.create_model", create)
    context, _ = create_encoder("vit_tiny_patch16_224", img_size=48, pretrained=True)
    assert asked["pretrained"] is True
    assert asked["img_size"] == 48
    vit = context.backbone.vit
    torch.testing.assert_close(vit.pos_embed, donor.pos_embed[:, 1:])
    torch.testing.assert_close(vit.blocks[5].mlp.fc1.weight, donor.blocks[5].mlp.fc1.weight)


def test_a_donor_of_another_shape_is_refused() -> None:
    donor = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2, num_classes=0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adopt_weights(vit, donor)


def test_weights_that_cannot_be_had_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model\.pretrained: timm could not supply weights"):
        create_encoder("vit_tiny_patch16_224", pretrained=True)
