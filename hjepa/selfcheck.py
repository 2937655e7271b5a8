"""Whether a device computes what the CPU computes, asked before hours are spent on it."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config import Config
from hjepa.data.views import Views, draw_views
from hjepa.distributed import alone
from hjepa.errors import ConfigError, first_line
from hjepa.masks import Masks
from hjepa.memory import synthetic_batch
from hjepa.model.hjepa import HJEPA
from hjepa.objective import Objective
from hjepa.optim import build_optimizers, skip_step_if

# Float32 in another order differs by 1e-5; a kernel that is wrong, by about one.
TOLERANCE = 1e-2
IMAGES, IMAGES_SEEN = 2, 8
LEARNING_RATE = 1e-3  # so that rounding of the weights is no part of a move


def verify_device(config: Config, model: HJEPA, device: torch.device, tolerance: float = TOLERANCE) -> None:
    """Compare with the CPU, in float32, what a step computes: views, a gradient, what moves, and what must not.

    Args:
        config: the whole of a run.
        model: on the CPU, as it was built; stays as it is.
        device: that is asked.
        tolerance: the largest distance of a tensor, relative to the CPU's of all that are compared with it.

    Raises:
        ConfigError: when they differ, naming what differs most.
    """
    cpu = torch.device("cpu")
    views = [{"data.augmentation": _views(config, where)} for where in (cpu, device)]
    _compare("view of an image", views, device, tolerance)
    batch = synthetic_batch(config, IMAGES, cpu)
    objective = Objective(config.loss, config.model.num_hierarchies, model.taps)
    gradients = [_gradient(deepcopy(model).to(where), objective, batch, where) for where in (cpu, device)]
    _compare("gradient", gradients, device, tolerance)
    moves = [_moves(config, model, gradients[0], where) for where in (cpu, device)]
    _compare("step of the optimizer", moves, device, tolerance)


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


def _compare(what: str, computed: list[dict[str, Tensor]], device: torch.device, tolerance: float) -> None:
    expected, found = computed
    scale = torch.stack([x.norm() for x in expected.values()]).norm()
    # not <=: a difference that is not a number is one as well.
    distances = {name: float((found[name] - x).norm() / scale) for name, x in expected.items()}
    wrong = [name for name, distance in distances.items() if not distance <= tolerance]
    if wrong:
        worst = max(wrong, key=lambda name: float("inf") if distances[name] != distances[name] else distances[name])
        raise ConfigError(
            f"device: {device.type} computes another {what} than the CPU (relative distance {distances[worst]:.2g} "
            f"at {worst}, {tolerance:g} is allowed); update torch and the system, or set device=cpu"
        )


def _views(config: Config, device: torch.device) -> Tensor:
    """Views of images of noise, on the CPU."""
    side = config.data.image_size + config.data.image_size // 8
    stored = torch.randint(
        256, (IMAGES_SEEN, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sizes = np.full((IMAGES_SEEN, 2), side, np.float32)
    drawn = draw_views(config.data.augmentation, 0, "selfcheck", np.arange(IMAGES_SEEN), sizes)
    views = Views(config.data.augmentation, config.data.image_size).to(device)
    out: Tensor = views(stored.to(device), drawn.to(device))
    return out.cpu()


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


def _moves(config: Config, model: HJEPA, gradient: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """How far a step moves each weight, the slow encoder's included; a second one is not finite, and skipped."""
    before = {name: p.detach().cpu() for name, p in model.named_parameters()}
    model = deepcopy(model).to(device)
    optimizers = build_optimizers(config.training, model)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = LEARNING_RATE
    for bad in (False, True):
        for name, parameter in model.named_parameters():
            if name in gradient:
                parameter.grad = gradient[name].to(device) + (torch.nan if bad else 0.0)
        for optimizer in optimizers:
            skip_step_if(optimizer, torch.tensor(bad, device=device))
            optimizer.step()
        model.update_target(torch.tensor(1.0 if bad else 0.5, device=device))
    return {name: p.detach().cpu() - before[name] for name, p in model.named_parameters()}
