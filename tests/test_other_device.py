"""A step on a device that is not here: tensors without values, which torch lets lie anywhere.

What such a tensor cannot show is the gradient itself, so every parameter is given one. All else of a step is the real
code: views, masks, both encoders, predictor, losses, clipping, optimizer, target encoder, and the line of the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hjepa.config import load_config
from hjepa.console import Console
from hjepa.data.workers import Loader
from hjepa.fabric import open_fabric
from hjepa.optim import Schedules, build_optimizers
from hjepa.run import Progress, Run, build
from hjepa.step import describe, take_step

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
AWAY = torch.device("cuda", 0)
SMALL = (
    "data.datasets=[{name: shapes, length: 16}]",
    "data.sampling_strategy=concat",
    "data.batch_size=4",
    "data.global_batch_size=null",
    "data.num_workers=0",
    "evaluation.eval_frequency=0",
    "model.pretrained=false",
    "training.use_amp=false",
    "device=cpu",
)


class Away(TorchDispatchMode):
    """A device without float64, as Apple's, on which the host waits for nothing unless it may.

    Attributes:
        reads: how often the host read a value of the device.
        may_read: whether it may.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.may_read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._note(args[0].device.type != "cpu", "a value is read")
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        before = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                away = tensor.device.type != "cpu"
                assert not (away and tensor.dtype == torch.float64), f"{func}: float64"
                self._note(not away and AWAY.type in before, f"{func}: a tensor is brought back")
        return out

    def _note(self, read: bool, what: str) -> None:
        self.reads += read
        assert self.may_read or not read, f"the host waits: {what}"


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # unknown to tensors without values
    return FakeTensorMode(allow_non_fake_inputs=True)


def carried_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run, moved to a device that is not there."""
    monkeypatch.setattr(run.fabric._strategy, "_root_device", AWAY)
    run.model.to(AWAY)
    run.views, run.crops = run.views.to(AWAY), run.crops.to(AWAY)
    made = build_optimizers(run.config.training, run.model)
    run.module, *run.optimizers = run.fabric.setup(run.model, *made, move_to_device=False)
    run.progress = Progress.start(AWAY)

    def backward(loss: Tensor) -> None:
        assert loss.device == AWAY
        assert loss.requires_grad
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(run.fabric, "backward", backward)
    run.model.train()
    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_recipe_on_a_device_without_float64_that_nobody_waits_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: FakeTensorMode
) -> None:
    config = load_config(CONFIGS / name, [*SMALL, f"experiment.output_dir={tmp_path}"])
    with Console() as console:
        run = build(config, *open_fabric(config), console)
        batches = iter(list(Loader(run.batches, 0, 2, False)))
        with mode, Away() as away:
            carried_over(run, monkeypatch)
            schedules = Schedules(config.training, config.model.ema, 4, 4)
            taken = take_step(run, schedules, 0, batches)
            assert all(p.device == AWAY for p in run.model.parameters())
            assert taken.losses.total.device == taken.norm.device == AWAY
            assert away.reads == 0
            away.may_read = True
            line = describe(run, schedules, 0, taken)
    assert {"loss", "grad_norm", "rankme", "std/level0"} <= line.keys()
    assert away.reads >= len(line) - 5
