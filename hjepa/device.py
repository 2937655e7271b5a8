"""What each kind of device supports, in one table."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch

from hjepa.errors import ConfigError


@dataclass(frozen=True)
class DeviceKind:
    """One row: how Lightning names the accelerator, and whether bfloat16 autocast and pinned memory exist."""

    name: str
    accelerator: str
    pin_memory: bool


KINDS = {
    "cuda": DeviceKind("cuda", "cuda", pin_memory=True),
    "mps": DeviceKind("mps", "mps", pin_memory=False),
    "cpu": DeviceKind("cpu", "cpu", pin_memory=False),
}


def available(kind: str) -> bool:
    """Whether this machine has such a device."""
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind == "cpu"


def choose(wanted: str) -> DeviceKind:
    """The device a config asks for; `auto` takes the best there is.

    Raises:
        ConfigError: when the device is not there. Nothing falls back in silence.
    """
    if wanted == "auto":
        wanted = next(kind for kind in KINDS if available(kind))
    if not available(wanted):
        here = [kind for kind in KINDS if available(kind)]
        raise ConfigError(
            f"device: {wanted} was asked for and this machine has none; use device=auto (here: {here[0]})"
        )
    return KINDS[wanted]


def precision(kind: DeviceKind, use_amp: bool) -> str:
    """Fabric's name of the arithmetic: float32, or bfloat16 autocast.

    bfloat16 needs no loss scaling, so a non-finite gradient is always a fault and never routine.

    Raises:
        ConfigError: for a GPU without bfloat16.
    """
    if not use_amp:
        return "32-true"
    if kind.name == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.use_amp: this GPU has no bfloat16; set training.use_amp=false")
    return "bf16-mixed"


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device on CUDA and MPS (there: held now by the driver), resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_layout() -> tuple[int, int]:
    """(processes on this machine, machines) as `torchrun` set them; (1, 1) without it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return local, int(os.environ.get("WORLD_SIZE", str(local))) // local
