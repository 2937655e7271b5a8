"""The optimizer's parameter groups, and its settings as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hjepa.config.model import EMA
from hjepa.config.sections import Training


def parameter_groups(
    model: nn.Module, weight_decay: float, without: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases, scales, positions and queries do not."""
    left_out = set(map(id, without))
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in left_out:
            place = name.rpartition(".")[2] in ("pos_embed", "queries")
            (exempt if parameter.ndim < 2 or place else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def build_optimizers(
    config: Training, model: nn.Module, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """What `training.optimizer` names; both kinds can be told on the device to skip a step (`skip_step_if`).

    `adamw` is one fused AdamW for everything. `muon` is `Muon` for the matrices inside transformer blocks, where a
    matrix maps one hidden space to another, and the same AdamW for the rest: patches, positions, norms, heads,
    projector.

    Args:
        config: of training.
        model: what is trained.
        dtype: in which `Muon` multiplies matrices; bfloat16 is enough where the device has units for it.
    """
    hidden: list[nn.Parameter] = []
    if config.optimizer == "muon":
        trainable = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        hidden = [p for name, p in trainable if ".blocks." in name and p.ndim == 2]
    groups = parameter_groups(model, config.weight_decay, without=hidden)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    ]
    if hidden:
        optimizers.append(Muon(hidden, config.lr, config.weight_decay, config.muon_momentum, dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix moves equally far (Jordan et al. 2024).

    The update of an `[a, b]` matrix is scaled by 0.2 sqrt(max(a, b)), which gives it the root mean square that AdamW's
    typically has, so that both can share learning rate and decay (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    Matrices of one shape are computed together. torch has an optimizer of this name; it takes one matrix after
    another and cannot be told to skip a step without the host waiting for the device.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take matrices.

        Args:
            params: `[a, b]` each.
            lr: learning rate.
            weight_decay: decoupled, as AdamW's.
            momentum: of the gradient's average, applied as Nesterov's.
            dtype: see `orthogonalised`; no part of the state, so that a run goes on where the device has another.
        """
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient; none where `found_inf` is true."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for matrices in shapes.values():
                self._move(matrices, group)

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        gradient, average = torch.stack([p.grad for p in matrices if p.grad is not None]), torch.stack(buffers)
        good: float | Tensor = 1.0
        if self.found_inf is not None:
            good = 1 - self.found_inf.to(gradient.device)
            gradient = torch.where(good > 0, gradient, average)  # an average of itself stays as it is
        average = torch.lerp(average, gradient, 1 - group["momentum"])
        update = orthogonalised(torch.lerp(gradient, average, group["momentum"]), self.dtype)
        rate = group["lr"] * good
        step = update * (rate * 0.2 * max(update.shape[1:]) ** 0.5)
        moved = torch.stack(list(matrices)) * (1 - rate * group["weight_decay"]) - step
        torch._foreach_copy_([*buffers, *matrices], [*average.unbind(), *moved.unbind()])


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly U V' of each matrix U S V': five Newton-Schulz steps whose polynomial drives singular values to about 1.

    The coefficients are Jordan's: they let values settle anywhere within 0.7 to 1.2, and so are fast. bfloat16 is
    enough for that: four times as fast where a processor has units for it, twenty times slower where it has none.

    Args:
        matrices: `[n, a, b]` float.
        dtype: of the products.

    Returns:
        the same shape and dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-7).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


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

    def apply(self, optimizers: Iterable[torch.optim.Optimizer], step: int) -> None:
        """Set the learning rate of a step."""
        for optimizer in optimizers:
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

    The fused kernels and `Muon` read the flag themselves (it is what gradient scalers use), so no host ever waits.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
