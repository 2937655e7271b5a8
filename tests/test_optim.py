from itertools import pairwise

import pytest
import torch

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.config.model import EMA
from hjepa.config.sections import Training
from hjepa.optim import Schedules, build_optimizer, clip_gradients, parameter_groups, skip_step_if


def test_learning_rate_warms_up_and_decays_to_the_end() -> None:
    s = Schedules(Training(epochs=10, warmup_epochs=2, lr=1e-3, min_lr=1e-5), EMA(), steps_per_epoch=10)
    rates = [s.lr(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 21)
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == 20
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))


def test_warmup_defaults_to_a_twentieth() -> None:
    assert Schedules(Training(epochs=40), EMA(), steps_per_epoch=10).warmup == pytest.approx(20)


def test_momentum_goes_from_start_to_end() -> None:
    s = Schedules(Training(epochs=10), EMA(momentum=0.9, momentum_end=0.999), steps_per_epoch=10)
    assert s.momentum(0) == pytest.approx(0.9)
    assert s.momentum(99) == pytest.approx(0.999)


def test_momentum_warmup_lets_the_target_follow_at_first() -> None:
    ema = EMA(momentum=0.99, momentum_end=0.99, momentum_warmup_epochs=2)
    s = Schedules(Training(epochs=10), ema, steps_per_epoch=10)
    assert s.momentum(0) == 0
    assert s.momentum(10) == pytest.approx(1 - 1 / 50.5)
    assert s.momentum(20) == pytest.approx(0.99)


@pytest.mark.parametrize(("epochs", "start", "end"), [(1, 0.9, 0.9), (100, 0.9, 0.99), (10000, 0.999, 0.9999)])
def test_default_momentum_fits_the_length_of_the_run(epochs: int, start: float, end: float) -> None:
    s = Schedules(Training(epochs=epochs), EMA(), steps_per_epoch=10)
    assert s.momentum_start == pytest.approx(start)
    assert s.momentum_end == pytest.approx(end)


def test_only_matrices_decay(small: tuple[str, ...]) -> None:
    config = load_config(None, (*small, "model.use_layerscale=true", "loss.type=sigreg"))
    model = create_hjepa_from_config(config)
    decayed, exempt = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    exempt_names = [names[id(p)] for p in exempt["params"]]
    for wanted in ("pos_embed", "queries", "norm1.weight", "qkv.bias", "gamma"):
        assert any(wanted in name for name in exempt_names), wanted
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(exempt["params"]) == len(trainable)
    assert not any("target_encoder" in name for name in exempt_names)


def test_clipping_returns_the_norm_before() -> None:
    layer = torch.nn.Linear(3, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
    assert clip_gradients(layer, 1.0).item() == pytest.approx(5)
    assert layer.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
    assert clip_gradients(layer, None).item() == pytest.approx(1, rel=1e-4)


def test_a_skipped_step_leaves_weights_and_moments() -> None:
    layer = torch.nn.Linear(3, 1)
    optimizer = build_optimizer(Training(), layer)
    for bad in (False, True, False):
        for p in layer.parameters():
            p.grad = torch.full_like(p, float("nan") if bad else 1.0)
        before = [p.detach().clone() for p in layer.parameters()]
        skip_step_if(optimizer, torch.tensor(bad))
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
        assert moved is not bad
    assert all(torch.isfinite(s["exp_avg"]).all() and s["step"] == 2 for s in optimizer.state.values())
