"""Operations counted from shapes are those that torch's counter sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.flops import flops_per_image
from hjepa.memory import synthetic_batch
from hjepa.objective import Objective

SIZE = 8


@pytest.mark.parametrize(
    "words",
    [
        ("loss.type=smoothl1", "data.num_views=1"),
        ("model.num_hierarchies=2", "loss.type=mse", "data.num_views=1", "model.target_layers=[1,3]"),
        (
            "model.num_hierarchies=2",
            "model.fpn.use_fpn=true",
            "model.fpn.fusion_method=concat",
            "model.fpn.feature_dim=24",
        ),
        ("model.num_hierarchies=2", "model.fpn.use_fpn=true", "model.fpn.fusion_method=add"),
        ("model.predictor.attention=cross", "model.num_hierarchies=2", "model.predictor.depth=2"),
        ("loss.type=sigreg", "loss.predict_every=4", "data.num_views=2"),
        ("loss.type=sigreg", "data.num_views=1"),
        ("loss.type=combined", "data.num_views=3"),
        (
            "loss.type=sigreg",
            "data.num_views=2",
            "data.multicrop.num_local_crops=3",
            "data.multicrop.local_crop_size=32",
        ),
        (
            "loss.type=sigreg",
            "data.num_views=2",
            "model.use_target_encoder=false",
            "masking.num_masks=0",
            "loss.hierarchy_weights=[0]",
        ),
        ("model.rope.use_rope=true", "model.encoder_type=vit", "loss.type=smoothl1", "data.num_views=1"),
    ],
    ids=lambda words: " ".join(words),
)
def test_count(small: tuple[str, ...], words: tuple[str, ...]) -> None:
    # torch does not see into fused attention on a CPU.
    config = load_config(None, [*small, "model.num_hierarchies=1", "model.use_flash_attention=false", *words])
    model = create_hjepa_from_config(config).train()
    objective = Objective(config.loss, config.model.num_hierarchies, model.taps)
    batch = synthetic_batch(config, SIZE, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        objective(model(*batch), 0).total.backward()
    assert counter.get_total_flops() == pytest.approx(SIZE * flops_per_image(config).total, rel=1e-6)


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize(("side", "patch"), [(32, 4), (96, 8), (128, 8), (224, 16)])
def test_count_of_encoders_as_they_are_used(name: str, side: int, patch: int) -> None:
    words = (f"model.encoder_type=vit_{name}_patch16_224", f"model.patch_size={patch}", f"data.image_size={side}")
    words += ("model.use_flash_attention=false", "loss.type=sigreg", "data.num_views=2")
    # The synthetic batch has the masks of seed 0.
    config = load_config(None, [*words, "data.multicrop.num_local_crops=1", "experiment.seed=0"])
    away = torch.device("meta")  # shapes without values: nothing is computed
    with away:
        model = create_hjepa_from_config(config).train()
    objective = Objective(config.loss, config.model.num_hierarchies, model.taps)
    batch = synthetic_batch(config, 2, away)
    with FlopCounterMode(display=False) as counter:
        objective(model(*batch), 0).total.backward()
    assert counter.get_total_flops() == pytest.approx(2 * flops_per_image(config).total, rel=1e-6)


def test_what_is_not_done_costs_nothing(small: tuple[str, ...]) -> None:
    alone = [
        "loss.type=sigreg",
        "data.num_views=2",
        "model.use_target_encoder=false",
        "masking.num_masks=0",
        "loss.hierarchy_weights=[0]",
    ]
    flops = flops_per_image(load_config(None, [*small, "model.num_hierarchies=1", *alone]))
    assert flops.target == flops.predictor == 0
    flat = flops_per_image(load_config(None, [*small, "loss.type=smoothl1", "data.num_views=1"]))
    assert flat.image_level == 0 < flat.target
