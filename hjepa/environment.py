"""What a process runs on, in words and versions, so that a figure can be read years later."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("hjepa", "torch", "torchvision", "timm", "lightning-fabric", "numpy")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, system and device of this process; what is not known is left out."""
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            continue
    return {"device": device_name(device), **found}


def device_name(device: torch.device) -> str:
    """A device as its maker calls it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_processor()}, {torch.get_num_threads()} thread(s))"


def _processor() -> str:
    """The model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
