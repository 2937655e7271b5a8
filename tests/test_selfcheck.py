"""A device is believed when its step is the CPU's; on a CPU, a wrong one has to be made."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.device import KINDS, available
from hjepa.errors import ConfigError
from hjepa.model.predictor import Predictor
from hjepa.optim import skip_step_if
from hjepa.selfcheck import verify_device
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
    verify_device(config, model, torch.device(device))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device == CPU for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("factor", [1.1, -1.0, 0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_wrong_is_refused(small: tuple[str, ...], strange: type[Strange], factor: float) -> None:
    config = load_config(None, small)
    model = create_hjepa_from_config(config)
    strange.factor = factor
    with pytest.raises(ConfigError, match="device: cpu computes another gradient than the CPU") as refused:
        verify_device(config, model, CPU)
    assert "device=cpu" in str(refused.value)
    assert strange.calls == 2
    strange.calls = 0
    strange.factor = 1 + 1e-5  # rounding
    verify_device(config, model, CPU)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("hjepa.data.views.crop_resize", lambda x: x.flip(3), "view of an image .* at data.augmentation"),
        ("hjepa.data.views.gaussian_blur", lambda x: x * 1.1, "view of an image .* at data.augmentation"),
        ("torch._foreach_lerp_", None, "step of the optimizer .* at target_encoder"),
    ],
)
def test_views_and_moves_that_are_wrong_are_refused(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, optimizer: str, name: str, wrong: Any, said: str
) -> None:
    strong = (
        "data.augmentation={color_jitter: 0.4, hue_jitter: 0.1, grayscale: 0.2, gaussian_blur: 1, solarization: 0.1}"
    )
    config = load_config(None, (*small, strong, f"training.optimizer={optimizer}"))
    model = create_hjepa_from_config(config)
    verify_device(config, model, CPU)
    holder, _, attribute = name.rpartition(".")
    right, calls = getattr(import_module(holder), attribute), 0

    def each_second_time(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if wrong is None:  # moves what it should on the CPU, which comes first and calls it twice
            return right(*args, **kwargs) if calls <= 2 else None
        return wrong(right(*args, **kwargs)) if calls == 2 else right(*args, **kwargs)

    monkeypatch.setattr(import_module(holder), attribute, each_second_time)
    with pytest.raises(ConfigError, match=f"device: cpu computes another {said}"):
        verify_device(config, model, CPU)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_that_takes_what_is_not_finite_is_refused(
    small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = load_config(None, (*small, f"training.optimizer={optimizer}"))
    model, calls = create_hjepa_from_config(config), 0

    def forgets(each: torch.optim.Optimizer, bad: Tensor) -> None:
        nonlocal calls
        calls += 1
        # The CPU's steps come first: two of each optimizer.
        skip_step_if(each, bad if calls <= 2 * (1 + (optimizer == "muon")) else torch.zeros_like(bad))

    monkeypatch.setattr("hjepa.selfcheck.skip_step_if", forgets)
    with pytest.raises(ConfigError, match=r"another step of the optimizer than the CPU \(relative distance nan"):
        verify_device(config, model, CPU)


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
