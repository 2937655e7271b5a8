import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.build import create_hjepa_from_config, grid_of
from hjepa.config import Config, load_config
from hjepa.grid import pool
from hjepa.masks import BlockMasks, Masks
from hjepa.model.hjepa import HJEPA
from hjepa.model.predictor import create_predictor
from hjepa.model.pyramid import level_targets, spread_taps, taps_of_level
from hjepa.objective import Objective

variants = pytest.mark.parametrize(
    "extra",
    [
        (),
        ("model.num_hierarchies=1",),
        ("model.num_hierarchies=3", "masking.mask_scale=[0.25,0.3]", "masking.num_masks=3"),
        ("model.num_hierarchies=4", "masking.mask_scale=[0.7,0.9]", "masking.num_masks=1"),
        ("model.fpn.use_fpn=true",),
        ("model.fpn.use_fpn=true", "model.fpn.fusion_method=concat", "model.fpn.feature_dim=24"),
        ("model.rope.use_rope=true", "model.use_layerscale=true"),
        ("model.target_layers=[2]",),
        ("loss.type=combined", "data.num_views=2"),
        ("loss.type=sigreg", "data.num_views=3"),
        ("loss.type=sigreg",),
        ("loss.type=sigreg", "data.multicrop.num_local_crops=2"),
        ("loss.type=combined", "data.multicrop.num_local_crops=2", "model.rope.use_rope=true"),
        ("model.use_target_encoder=false",),
        ("model.use_target_encoder=false", "loss.type=sigreg"),
        ("model.use_target_encoder=false", "loss.type=sigreg", "model.rope.use_rope=true", "data.num_views=2"),
    ],
    ids=str,
)  # fmt: skip


def batch_of(config: Config, batch: int = 4) -> tuple[Tensor, Masks]:
    sampler = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    views = [sampler.sample(0, 0, f"view{v}", np.arange(batch)) for v in range(config.data.num_views)]
    side = config.data.image_size
    images = torch.randn(config.data.num_views, batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images, Masks(*(torch.cat(parts) for parts in zip(*views, strict=True)))


def crops_of(config: Config, batch: int = 4) -> Tensor | None:
    count, side = config.data.multicrop.num_local_crops, config.data.local_size(config.model.shape.patch_size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, batch, 3, side, side, generator=generator) if count else None


def image_size_for(extra: tuple[str, ...]) -> tuple[str, ...]:
    # Four levels need a block of 8 x 8 patches and something beside it.
    return ("data.image_size=80",) if "model.num_hierarchies=4" in extra else ()


@variants
def test_every_variant_predicts_what_it_aims_at_and_trains_all_of_itself(
    small: tuple[str, ...], extra: tuple[str, ...]
) -> None:
    config = load_config(None, (*small, *image_size_for(extra), *extra))
    model = create_hjepa_from_config(config)
    images, masks = batch_of(config)
    output = model(images, masks, crops_of(config))
    assert len(output.predictions) == config.model.num_hierarchies
    for prediction, target in zip(output.predictions, output.targets, strict=True):
        assert prediction.shape == target.shape
        assert prediction.numel() > 0
        assert not target.requires_grad
    Objective(config.loss, model.num_levels, model.taps)(output, 0).total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0 or "bias" in name, name


def test_targets_are_normalised_taps_pooled_and_normalised_again() -> None:
    maps = torch.randn(3, 4, 6, 3, 16) * 5 + 2
    fine, coarse = level_targets(maps, 2)
    torch.testing.assert_close(fine, F.layer_norm(maps, (16,)))
    assert coarse.shape == (3, 2, 3, 2, 16)  # one shallow tap fewer
    expected = F.layer_norm(pool(F.layer_norm(maps[..., 1:, :], (16,)).flatten(-2), 1).unflatten(-1, (2, 16)), (16,))
    torch.testing.assert_close(coarse, expected)


def test_coarser_levels_read_deeper_taps() -> None:
    assert spread_taps(12) == (4, 8, 12)
    assert spread_taps(1) == (1,)
    assert [list(range(3))[taps_of_level(3, level)] for level in range(4)] == [[0, 1, 2], [1, 2], [2], [2]]


def test_targets_are_the_target_encoders_at_the_hidden_places(small: tuple[str, ...]) -> None:
    config = load_config(None, small)
    model = create_hjepa_from_config(config)
    images, masks = batch_of(config)
    output = model(images, masks)
    taps = model.target_encoder(images[0], taps=model.taps).taps
    b, m, i, j = 2, 1, 0, 1
    patch = masks.targets[b, m, i, j]
    for t, tap in enumerate(taps):
        expected = F.layer_norm(tap[b, patch], tap.shape[-1:])
        torch.testing.assert_close(output.targets[0][b, m, i, j, t], expected, rtol=1e-4, atol=1e-5)


def test_a_prediction_knows_where_it_is_and_what_is_seen_but_not_what_is_hidden(small: tuple[str, ...]) -> None:
    config = load_config(None, small)
    model = create_hjepa_from_config(config).eval()
    images, masks = batch_of(config)
    with torch.no_grad():
        base = model(images, masks).predictions
        hidden = images.clone()
        for b in range(4):
            for patch in set(range(64)) - set(masks.context[b].tolist()):
                row, column = divmod(patch, 8)
                hidden[0, b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
        for a, b in zip(base, model(hidden, masks).predictions, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (base[0] - model(-images, masks).predictions[0]).abs().max() > 5e-5
        assert (base[0][:, 0, 0, 0] - base[0][:, 0, 0, 1]).abs().max() > 1e-5


def test_the_predictor_is_narrow_and_its_settings_arrive(small: tuple[str, ...]) -> None:
    config = load_config(
        None, (*small, "model.predictor.depth=2", "model.predictor.num_heads=4", "model.predictor.mlp_ratio=2")
    )
    predictor = create_predictor(config.model, grid_of(config))
    assert len(predictor.blocks) == 2
    assert predictor.blocks[0].attn.num_heads == 4
    assert predictor.blocks[0].mlp.fc1.out_features == 32
    default = create_predictor(load_config(None, ()).model, grid_of(load_config(None, ())))
    assert default.dim == 192
    assert default.blocks[0].attn.num_heads == 3  # the encoder's head width, 64


def test_the_top_down_path_carries_the_coarse_prediction_into_the_fine_one(small: tuple[str, ...]) -> None:
    _, masks = batch_of(load_config(None, small))
    changes = {}
    for fpn in ("false", "true"):
        config = load_config(None, (*small, f"model.fpn.use_fpn={fpn}", "model.predictor.depth=1"))
        predictor = create_hjepa_from_config(config).eval().predictor
        seen = torch.randn(4, masks.context.shape[1], 32, generator=torch.Generator().manual_seed(1))
        before = predictor(seen, masks)[0]
        with torch.no_grad():
            # The query vector of the coarse level alone; without blocks nothing but the FPN joins the levels.
            predictor.blocks = torch.nn.ModuleList()
            before = predictor(seen, masks)[0]
            predictor.queries[1].add_(torch.randn(16, generator=torch.Generator().manual_seed(2)))
        changes[fpn] = (predictor(seen, masks)[0] - before).abs().max()
    assert changes["false"] == 0
    assert changes["true"] > 1e-4


def test_checkpointing_leaves_all_gradients_as_they_are(small: tuple[str, ...]) -> None:
    gradients = []
    for blocks, recomputing in (
        ("false", (False, False)),
        ("encoder", (True, False)),
        ("predictor", (False, True)),
        ("true", (True, True)),
    ):
        config = load_config(None, (*small, f"training.use_gradient_checkpointing={blocks}"))
        model = create_hjepa_from_config(config).train()
        assert (model.context_encoder.backbone.checkpointing, model.predictor.checkpointing) == recomputing
        output = model(*batch_of(config))
        Objective(config.loss, model.num_levels, model.taps)(output, 0).total.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, *others in zip(*gradients, strict=True):
        for b in others:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_view_agrees_with_the_target_encoder_and_sends_it_no_gradient(small: tuple[str, ...]) -> None:
    config = load_config(None, (*small, "loss.type=sigreg"))
    model = create_hjepa_from_config(config)
    output = model(*batch_of(config, 8))
    assert output.embeddings is not None
    assert output.embeddings.shape == (2, 8, 8)
    (gradient,) = torch.autograd.grad(output.embeddings[1].sum(), model.projector[0].weight, allow_unused=True)  # type: ignore[index]
    assert gradient is None or gradient.abs().sum() == 0


# Without a target encoder


def test_without_a_target_encoder_targets_are_the_encoders_own_in_eval_mode(small: tuple[str, ...]) -> None:
    config = load_config(None, (*small, "model.use_target_encoder=false", "model.drop_path_rate=0.5"))
    model = create_hjepa_from_config(config).train()
    assert model.target_encoder is None
    assert not any("target" in name for name in model.state_dict())
    images, masks = batch_of(config)
    output = model(images, masks)
    assert model.training
    assert all(module.training for module in model.context_encoder.modules())
    again = model(images, masks)
    assert not torch.equal(output.predictions[0], again.predictions[0])  # paths are dropped on the context's way
    for a, b in zip(output.targets, again.targets, strict=True):
        assert torch.equal(a, b)  # and not on the target's
        assert not a.requires_grad
    with torch.no_grad():
        whole = model.context_encoder.eval()(images[0], taps=model.taps).taps
    b, m, i, j = 2, 1, 0, 1
    expected = F.layer_norm(whole[0][b, masks.targets[b, m, i, j]], (32,))
    torch.testing.assert_close(output.targets[0][b, m, i, j, 0], expected, rtol=1e-4, atol=1e-5)


def test_without_a_target_encoder_the_gradient_comes_from_the_context_alone(small: tuple[str, ...]) -> None:
    config = load_config(None, (*small, "model.use_target_encoder=false"))
    model = create_hjepa_from_config(config)
    twin = create_hjepa_from_config(load_config(None, small))
    gradients = []
    for each in (model, twin):  # a target encoder that equals the context encoder gives the same targets
        output = each(*batch_of(config))
        Objective(config.loss, each.num_levels, each.taps)(output, 0).total.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7, msg=name)
    model.update_target(0.5)  # nothing to move


def test_without_a_target_encoder_probes_read_the_one_there_is(small: tuple[str, ...]) -> None:
    model = create_hjepa_from_config(load_config(None, (*small, "model.use_target_encoder=false"))).eval()
    images = torch.randn(3, 3, 64, 64)
    for a, b in zip(model.embed(images).values(), model.embed(images, online=True).values(), strict=True):
        assert torch.equal(a, b)


# The image level alone


ALONE = ("loss.hierarchy_weights=[0,0]", "loss.type=sigreg", "data.num_views=2")


@pytest.mark.parametrize("target", ["true", "false"])
def test_the_image_level_alone_has_no_predictor_and_trains_all_of_itself(small: tuple[str, ...], target: str) -> None:
    config = load_config(None, (*small, *ALONE, f"model.use_target_encoder={target}"))
    model = create_hjepa_from_config(config)
    assert model.predictor is None
    images, masks = batch_of(config)
    output = model(images, masks)
    assert output.predictions == output.targets == []
    assert output.num_global == 2
    assert output.target_taps.shape == (8, 1, 3, 32)
    assert not output.target_taps.requires_grad
    assert not output.target_tokens.requires_grad
    losses = Objective(config.loss, model.num_levels, model.taps)(output, 0)
    assert losses.terms.keys() == {"sigreg/invariance", "sigreg/sigreg"}
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is name.startswith("target_encoder"), name


def test_nothing_hidden_is_all_patches_seen(small: tuple[str, ...]) -> None:
    config = load_config(None, (*small, *ALONE, "masking.num_masks=0"))
    images, masks = batch_of(config)
    assert masks.targets.shape[:2] == (8, 0)
    assert torch.equal(masks.context, torch.arange(64).expand(8, -1))
    model = create_hjepa_from_config(config).eval()
    embeddings = model(images, masks).embeddings
    whole = [model.projector(model.context_encoder(view).tokens.mean(dim=1)) for view in images]
    torch.testing.assert_close(embeddings, torch.stack(whole), rtol=1e-4, atol=1e-5)


# Local crops


@pytest.mark.parametrize("rope", ["true", "false"])
@pytest.mark.parametrize("views", [1, 2])
def test_local_crops_go_through_the_context_encoder_at_their_own_grid(
    small: tuple[str, ...], rope: str, views: int
) -> None:
    extra = ("loss.type=sigreg", f"data.num_views={views}", "data.multicrop.num_local_crops=3")
    config = load_config(None, (*small, *extra, f"model.rope.use_rope={rope}"))
    model = create_hjepa_from_config(config).eval()
    crops = crops_of(config)
    assert crops is not None
    assert crops.shape == (3, 4, 3, 24, 24)  # 3/7 of 64 pixels in whole patches of 8
    sizes: list[int] = []
    hook = model.context_encoder.backbone.register_forward_hook(lambda _, __, out: sizes.append(out.tokens.shape[1]))
    images, masks = batch_of(config)
    output = model(images, masks, crops)
    hook.remove()
    assert sizes == [masks.context.shape[1], 9]
    assert output.num_global == views
    assert output.embeddings is not None
    assert output.embeddings.shape == (views + 3, 4, 8)
    for c in range(3):
        expected = model.projector(model.context_encoder(crops[c]).tokens.mean(dim=1))
        torch.testing.assert_close(output.embeddings[views + c], expected, rtol=1e-4, atol=1e-5)
    # What is predicted does not know of them.
    for a, b in zip(output.predictions, model(images, masks).predictions, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_crop_beside_one_view_takes_the_place_of_the_target_encoders_embedding(small: tuple[str, ...]) -> None:
    alone = load_config(None, (*small, "loss.type=sigreg"))
    crops = load_config(None, (*small, "loss.type=sigreg", "data.multicrop.num_local_crops=1"))
    model = create_hjepa_from_config(crops)
    assert model(*batch_of(alone)).num_global == 2
    output = model(*batch_of(crops), crops_of(crops))
    assert output.num_global == 1
    assert output.embeddings is not None
    assert output.embeddings.shape[0] == 2
    (gradient,) = torch.autograd.grad(output.embeddings[1].sum(), model.projector[0].weight)  # type: ignore[index]
    assert gradient.abs().sum() > 0


def test_embeddings_for_probes_have_names_and_follow_their_encoder(small: tuple[str, ...]) -> None:
    model = create_hjepa_from_config(load_config(None, small)).eval()
    images = torch.randn(5, 3, 64, 64)
    features = model.embed(images)
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        "last": (5, 32),
        "tap1": (5, 32),
        "tap2": (5, 32),
        "tap3": (5, 32),
        "level0": (5, 96),
        "level1": (5, 64),
    }
    torch.testing.assert_close(features["last"], model.embed(images, online=True)["last"])
    with torch.no_grad():
        for p in model.context_encoder.parameters():
            p.mul_(1.1)
    assert not torch.allclose(features["last"], model.embed(images, online=True)["last"])
    torch.testing.assert_close(features["last"], model.embed(images)["last"])


def test_two_seeds_give_two_models_and_one_seed_one(small: tuple[str, ...]) -> None:
    def weights(seed: int) -> Tensor:
        model: HJEPA = create_hjepa_from_config(load_config(None, (*small, f"experiment.seed={seed}")))
        return torch.cat([p.flatten() for p in model.parameters()])

    torch.testing.assert_close(weights(0), weights(0), rtol=0, atol=0)
    assert not torch.equal(weights(0), weights(1))
