"""The device and the processes of a run."""

from __future__ import annotations

from datetime import timedelta

import torch

from hjepa.config import Config
from hjepa.config.checks import process_checks
from hjepa.device import DeviceKind, can_recompute, choose, keep_freed_memory, precision, process_layout
from hjepa.errors import ConfigError
from hjepa.lightning import DDPStrategy, Fabric

# A process waits so long for another one, as the first probes alone. A machine that vanishes unheard costs as much.
PATIENCE = timedelta(hours=2)


def device_checks(config: Config, kind: str, local: int, nodes: int) -> str:
    """What this device cannot do of what was asked for, in words; nothing where it can do all.

    Args:
        config: the whole of a run.
        kind: the device's.
        local: processes on this machine.
        nodes: machines.
    """
    if kind == "mps" and local * nodes > 1:
        return "device: mps takes one process; start without torchrun, or set device=cpu"
    if kind == "cuda" and local > torch.cuda.device_count():
        return f"device: {local} processes and {torch.cuda.device_count()} GPU(s); lower --nproc-per-node"
    if kind == "mps" and config.training.use_compile:
        return "training.use_compile: not on mps; set it to false"
    recomputed = config.training.use_gradient_checkpointing in (True, "encoder")
    if recomputed and not can_recompute(kind, config.model.drop_path_rate):
        return (
            "training.use_gradient_checkpointing: on mps torch drops other paths when it computes a block again; set "
            "it to false, or model.drop_path_rate=0"
        )
    return ""


def open_fabric(config: Config) -> tuple[Fabric, DeviceKind]:
    """The device and the processes of a run.

    Raises:
        ConfigError: when the device is not there or cannot do what is asked for, or the batch does not divide into the
            processes.
    """
    kind = choose(config.device)
    if kind.name == "cpu":
        keep_freed_memory()
    local, nodes = process_layout()
    wrong = process_checks(config.data, config.training, local * nodes)
    wrong = wrong or device_checks(config, kind.name, local, nodes)
    if wrong:
        raise ConfigError(wrong)
    fabric = Fabric(
        accelerator=kind.accelerator,
        devices=local,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=PATIENCE, gradient_as_bucket_view=True) if local * nodes > 1 else "auto",
        precision=precision(kind, config.training.use_amp),
    )
    fabric.launch()
    return fabric, kind
