from itertools import pairwise

import pytest
import torch

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.config.model import EMA
from hjepa.config.sections import Training
from hjepa.console import Console
from hjepa.fabric import open_fabric
from hjepa.optim import (
    Muon,
    Schedules,
    build_optimizers,
    clip_gradients,
    orthogonalised,
    parameter_groups,
    skip_step_if,
)
from hjepa.run import build


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_and_moments(optimizer: str) -> None:
    blocks = torch.nn.ModuleList([torch.nn.Linear(3, 2)])
    layer = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"blocks": blocks})})
    optimizers = build_optimizers(Training(optimizer=optimizer), layer)
    assert len(optimizers) == (2 if optimizer == "muon" else 1)
    for bad in (False, True, False):
        for p in layer.parameters():
            p.grad = torch.full_like(p, float("nan") if bad else 1.0)
        before = [p.detach().clone() for p in layer.parameters()]
        moments = [v.clone() for o in optimizers for s in o.state.values() for v in s.values()]
        for each in optimizers:
            skip_step_if(each, torch.tensor(bad))
            each.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)]
        assert all(moved) is not bad
        assert any(moved) is not bad
        if bad:
            after = [v for o in optimizers for s in o.state.values() for v in s.values()]
            assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert all(torch.isfinite(v).all() for o in optimizers for s in o.state.values() for v in s.values())


def test_muon_is_for_the_matrices_of_blocks(small: tuple[str, ...]) -> None:
    model = create_hjepa_from_config(load_config(None, (*small, "model.use_layerscale=true", "loss.type=sigreg")))
    adamw, muon = build_optimizers(Training(optimizer="muon", weight_decay=0.1), model)
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert not of_muon & of_adamw
    assert of_muon | of_adamw == {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name.split(".blocks.")[1].split(".", 1)[1] for name in of_muon}
    assert kinds == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert any(name.startswith("predictor.") for name in of_muon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 64, 16), (3, 16, 64), (1, 8, 80)):
        x = torch.randn(shape, generator=g) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        found = orthogonalised(x, dtype)
        assert found.dtype == x.dtype
        # In the basis of the exact answer it is nearly the identity.
        values = (u.mT @ found @ vh.mT).diagonal(dim1=1, dim2=2)
        assert ((values > 0.3) & (values < 1.3)).all()
        assert values.mean() == pytest.approx(0.95, abs=0.15)
    assert torch.isfinite(orthogonalised(torch.zeros(1, 4, 4), dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_moves_as_torchs_muon_does(dtype: torch.dtype) -> None:
    """torch's own takes one matrix after another, in bfloat16; rounding is all that may differ."""
    g = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((8, 20), (8, 20), (12, 6))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    a = Muon(ours, **settings, dtype=dtype)
    b = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("units", "dtype"), [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)])
def test_a_run_multiplies_in_bfloat16_only_where_the_processor_has_units_for_it(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    config = load_config(None, (*small, "training.optimizer=muon", "evaluation.eval_frequency=0"))
    _, muon = build(config, *open_fabric(config), Console(enabled=False)).optimizers
    assert muon.optimizer.dtype == dtype
    used, product = set(), torch.baddbmm

    def spy(*args: torch.Tensor, **factors: float) -> torch.Tensor:
        used.update(arg.dtype for arg in args)
        return product(*args, **factors)

    monkeypatch.setattr(torch, "baddbmm", spy)
    for group in muon.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    muon.step()
    assert used == {dtype}
