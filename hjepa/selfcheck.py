"""Whether a device computes what the CPU computes, asked before hours are spent on it."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config import Config
from hjepa.distributed import alone
from hjepa.errors import ConfigError, first_line
from hjepa.masks import Masks
from hjepa.memory import synthetic_batch
from hjepa.model.hjepa import HJEPA
from hjepa.objective import Objective

# Float32 in another order differs by 1e-5; a kernel that is wrong, by about one.
TOLERANCE = 1e-2
IMAGES = 2


def verify_gradient(config: Config, model: HJEPA, device: torch.device, tolerance: float = TOLERANCE) -> None:
    """Compare one gradient on a device with the CPU's, in float32.

    Args:
        config: the whole of a run.
        model: on the CPU, as it was built; stays as it is.
        device: that is asked.
        tolerance: the largest distance of two gradients, relative to the CPU's.

    Raises:
        ConfigError: when they differ, naming the parameter that differs most.
    """
    batch = synthetic_batch(config, IMAGES, torch.device("cpu"))
    objective = Objective(config.loss, config.model.num_hierarchies, model.taps)
    expected = _gradient(deepcopy(model).cpu(), objective, batch, torch.device("cpu"))
    found = _gradient(deepcopy(model).to(device), objective, batch, device)
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    # not <=: a difference that is not a number is one as well.
    distances = {name: float((found[name] - g).norm() / scale) for name, g in expected.items()}
    wrong = [name for name, distance in distances.items() if not distance <= tolerance]
    if wrong:
        worst = max(wrong, key=lambda name: float("inf") if distances[name] != distances[name] else distances[name])
        raise ConfigError(
            f"device: {device.type} computes another gradient than the CPU (relative distance {distances[worst]:.2g} "
            f"at {worst}, {tolerance:g} is allowed); update torch and the system, or set device=cpu"
        )


def verify_compiler(device: torch.device) -> None:
    """See that torch.compile works here: it needs more than torch, such as a C++ compiler on a CPU.

    Args:
        device: that is compiled for.

    Raises:
        ConfigError: when it does not, with the reason that it gives.
    """

    def trial(x: Tensor) -> Tensor:
        return F.gelu(x) + 1

    try:
        torch.compile(trial)(torch.ones(8, device=device))
    except Exception as error:  # torch's, the compiler's and the system's have no common class
        raise ConfigError(
            f"training.use_compile: torch.compile does not work on this {device.type} ({first_line(error)}); "
            "install what it asks for, or set it to false"
        ) from None


def _gradient(
    model: HJEPA, objective: Objective, batch: tuple[Tensor, Masks, Tensor | None], device: torch.device
) -> dict[str, Tensor]:
    """The gradient of each parameter that has one, on the CPU."""
    model.eval()  # without dropped paths, which each device draws for itself
    images, masks, crops = batch
    with alone():
        losses = objective(model(images.to(device), masks.to(device), None if crops is None else crops.to(device)), 0)
        losses.total.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
