"""The optimizer's parameter groups, and its settings as functions of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hjepa.config.model import EMA
from hjepa.config.sections import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases, scales, positions and queries do not."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = name.rpartition(".")[2] in ("pos_embed", "queries")
            (exempt if parameter.ndim < 2 or place else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def build_optimizer(config: Training, model: nn.Module) -> torch.optim.AdamW:
    """AdamW in one fused kernel, which can also be told on the device to skip a step."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Schedules:
    """Learning rate and target momentum as functions of the step; nothing to save, nothing to drift."""

    def __init__(self, training: Training, ema: EMA, steps_per_epoch: int, total: int | None = None) -> None:
        """Fix the schedules.

        Args:
            training: the section.
            ema: the section.
            steps_per_epoch: optimizer steps in an epoch.
            total: optimizer steps of the run; those of `training.epochs` when not given. Where they are fewer
                (`training.max_time`), the warm-ups shrink with them.
        """
        planned = (training.epochs or 0) * steps_per_epoch
        self.training = training
        self.total = planned if total is None else total
        assert self.total > 0
        shrink = min(1.0, self.total / planned) if planned else 1.0
        warmup = training.warmup_epochs
        self.warmup = self.total * 0.05 if warmup is None else warmup * steps_per_epoch * shrink
        self.ema_warmup = ema.momentum_warmup_epochs * steps_per_epoch * shrink
        self.momentum_start = _default_momentum(self.total, 100) if ema.momentum is None else ema.momentum
        end = _default_momentum(self.total, 10) if ema.momentum_end is None else ema.momentum_end
        self.momentum_end = max(end, self.momentum_start) if ema.momentum_end is None else end

    def lr(self, step: int) -> float:
        """Linear from `warmup_lr` to `lr` over the warm-up, then half a cosine down to `min_lr` at the last step."""
        peak, low, first = self.training.lr, self.training.min_lr, self.training.warmup_lr
        if step < self.warmup:
            return first + (peak - first) * (step + 1) / (self.warmup + 1)
        return low + (peak - low) * _half_cosine(step - self.warmup, self.total - 1 - self.warmup)

    def momentum(self, step: int) -> float:
        """Half a cosine from `momentum` to `momentum_end`.

        In the warm-up the averaging horizon 1 / (1 - momentum) grows linearly from one step to its scheduled
        length, so that the target follows the first, fast changes and forgets the initial weights.
        """
        part = _half_cosine(step, self.total - 1)
        momentum = self.momentum_end + (self.momentum_start - self.momentum_end) * part
        if step < self.ema_warmup and momentum < 1:
            horizon = 1 / (1 - momentum)
            momentum = 1 - 1 / (1 + (horizon - 1) * step / self.ema_warmup)
        return momentum

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step)


def _half_cosine(step: float, length: float) -> float:
    """1 at step 0, 0 at `length` and after."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / length))) if length > 0 else 0.0


def _default_momentum(total_steps: int, parts: int) -> float:
    """An average over a `parts`-th of the run, within [0.9, 0.9999]."""
    return min(max(1 - parts / max(total_steps, 1), 0.9), 0.9999)


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale gradients to a norm of at most `limit`; return the norm before (0-d, on the device, no sync)."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def skip_step_if(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Make the next `step()` leave parameters and moments untouched where `bad` (0-d bool, on the device) is true.

    The fused kernels read the flag themselves (it is what gradient scalers use), so no host ever waits for it.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
