"""A device is believed when its gradient is the CPU's; on a CPU, a wrong one has to be made."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.device import KINDS, available
from hjepa.errors import ConfigError
from hjepa.model.predictor import Predictor
from hjepa.selfcheck import verify_gradient
from hjepa.train import train

CPU = torch.device("cpu")


class Strange(torch.autograd.Function):
    """Passes values on, and a wrong gradient back each second time: on the device, after the CPU."""

    calls = 0
    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Strange.calls += 1
        return gradients[0] * (Strange.factor if Strange.calls % 2 == 0 else 1.0)


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> type[Strange]:
    forward = Predictor.forward

    def twisted(self: Predictor, *args: Any, **kwargs: Any) -> Any:
        return [Strange.apply(x) if i == 0 else x for i, x in enumerate(forward(self, *args, **kwargs))]

    monkeypatch.setattr(Predictor, "forward", twisted)
    Strange.calls, Strange.factor = 0, 1.0
    return Strange


@pytest.mark.parametrize("kind", ["smoothl1", "combined", "sigreg"])
@pytest.mark.parametrize("device", [name for name in KINDS if available(name)])
def test_a_device_that_agrees_is_accepted_and_the_model_stays(small: tuple[str, ...], kind: str, device: str) -> None:
    config = load_config(None, (*small, f"loss.type={kind}", "data.num_views=2", "model.drop_path_rate=0.5"))
    model = create_hjepa_from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verify_gradient(config, model, torch.device(device))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device == CPU for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("factor", [1.1, -1.0, 0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_wrong_is_refused(small: tuple[str, ...], strange: type[Strange], factor: float) -> None:
    config = load_config(None, small)
    model = create_hjepa_from_config(config)
    strange.factor = factor
    with pytest.raises(ConfigError, match="device: cpu computes another gradient than the CPU") as refused:
        verify_gradient(config, model, CPU)
    assert "device=cpu" in str(refused.value)
    assert strange.calls == 2
    strange.calls = 0
    strange.factor = 1 + 1e-5  # rounding
    verify_gradient(config, model, CPU)


def test_a_run_asks_before_its_first_step_where_the_table_says_so(
    small: tuple[str, ...], strange: type[Strange], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert [name for name, kind in KINDS.items() if kind.is_verified] == ["mps"]
    settings = (*small, "evaluation.eval_frequency=0", "training.max_steps=1", f"experiment.output_dir={tmp_path}")
    strange.factor = 2.0
    monkeypatch.setitem(KINDS, "cpu", replace(KINDS["cpu"], is_verified=True))
    with pytest.raises(ConfigError, match="another gradient"):
        train(load_config(None, settings))
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    strange.factor = 1.0
    train(load_config(None, settings))
