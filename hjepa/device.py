"""What each kind of device supports, in one table."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from hjepa.config.types import Switch
from hjepa.errors import ConfigError


@dataclass(frozen=True)
class DeviceKind:
    """One row.

    Attributes:
        name: as in torch.
        accelerator: as Lightning calls it.
        pin_memory: whether there are page-locked batches.
        is_verified: whether a step is compared with the CPU's before training (`selfcheck`).
    """

    name: str
    accelerator: str
    pin_memory: bool
    is_verified: bool = False


KINDS = {
    "cuda": DeviceKind("cuda", "cuda", pin_memory=True),
    "mps": DeviceKind("mps", "mps", pin_memory=False, is_verified=True),
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


def precision(kind: DeviceKind, use_amp: Switch) -> str:
    """Fabric's name of the arithmetic: float32, or bfloat16 autocast.

    bfloat16 needs no loss scaling, so a non-finite gradient is always a fault and never routine.

    Raises:
        ConfigError: for a GPU without bfloat16 that is told to use it.
    """
    if not autocasts(kind.name, use_amp):
        return "32-true"
    if kind.name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("training.use_amp: this GPU has no bfloat16; set training.use_amp=auto, or device=cpu")
    return "bf16-mixed"


def autocasts(kind: str, use_amp: Switch) -> bool:
    """Whether steps are computed in bfloat16; `auto` does so on devices with units for it, where it is faster.

    Apple's GPUs stay in float32: those of the M1 have no such units, and none was at hand to measure.
    """
    return has_bfloat16(kind) if use_amp == "auto" else use_amp


def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind have units for bfloat16 here that are faster than those for float32.

    On a CPU without any, torch's products in bfloat16 took 20 times as long as those in float32. AVX-512's own
    are four times as fast as float32 on AMD's Zen 5 and half as fast on Intel's (a core of a Xeon: 84 and 166 GFLOP/s),
    which have AMX for it; a virtual machine may hide that.
    """
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # A torch that is too old to say has none.
    units: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    is_intel = str(units.get("cpu_name", "")).startswith("Intel")
    return bool(units.get("amx_bf16") or (units.get("avx512_bf16") and not is_intel))


def can_recompute(kind: str, drop_path_rate: float) -> bool:
    """Whether a block of the encoder computed again is the same: on MPS torch drops other paths the second time."""
    return kind != "mps" or not drop_path_rate


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the device on CUDA and MPS (there: held now by the driver), resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # Not ru_maxrss where it can be helped: that is inherited from the process that started this one.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Memory that this process holds now, in bytes (on macOS: the most it ever held)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(torch.device("cpu"))


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` start anew, where the device or the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()  # what the driver gave, the allocator keeps: that is the peak
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def free_memory(device: torch.device) -> int:
    """Memory that is left on the device for this process, in bytes."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - resident_memory()
    # A container may allow less than the machine has.
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    # So may a shell (ulimit -v), in addresses.
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        with suppress(OSError):
            free = min(free, most - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return free


def held_memory(device: torch.device) -> int:
    """Memory of the device that this process holds now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resident_memory()


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees for the next one; returns whether it could be told to.

    glibc hands every large block back to the system, which clears it page by page when it is asked for again: an
    eighth of a step's time on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # From malloc.h: M_MMAP_THRESHOLD (the most that glibc accepts), M_TRIM_THRESHOLD, M_TOP_PAD; in bytes.
    return all([mallopt(-3, 2**25), mallopt(-1, 2**31 - 1), mallopt(-2, 2**26)])


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether a device refused memory; only CUDA has an error of its own for it."""
    words = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(word in str(error).lower() for word in words)


def release_cache(device: torch.device) -> None:
    """Give back what the allocator keeps of memory that is not in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def process_layout() -> tuple[int, int]:
    """(processes on this machine, machines) as `torchrun` set them; (1, 1) without it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return local, int(os.environ.get("WORLD_SIZE", str(local))) // local
