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
    ],
    ids=str,
)  # fmt: skip


def batch_of(config: Config, batch: int = 4) -> tuple[Tensor, Masks]:
    sampler = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    views = [sampler.sample(0, 0, f"view{v}", np.arange(batch)) for v in range(config.data.num_views)]
    side = config.data.image_size
    images = torch.randn(config.data.num_views, batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images, Masks(*(torch.cat(parts) for parts in zip(*views, strict=True)))


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
    output = model(images, masks)
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
    for enabled in ("false", "true"):
        config = load_config(None, (*small, f"training.use_gradient_checkpointing={enabled}"))
        model = create_hjepa_from_config(config).train()
        assert model.predictor.checkpointing is model.context_encoder.backbone.checkpointing is (enabled == "true")
        output = model(*batch_of(config))
        Objective(config.loss, model.num_levels, model.taps)(output, 0).total.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_view_agrees_with_the_target_encoder_and_sends_it_no_gradient(small: tuple[str, ...]) -> None:
    config = load_config(None, (*small, "loss.type=sigreg"))
    model = create_hjepa_from_config(config)
    output = model(*batch_of(config, 8))
    assert output.embeddings is not None
    assert output.embeddings.shape == (2, 8, 8)
    (gradient,) = torch.autograd.grad(output.embeddings[1].sum(), model.projector[0].weight, allow_unused=True)  # type: ignore[index]
    assert gradient is None or gradient.abs().sum() == 0


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
