"""How large a batch fits, found by trying on the device itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hjepa.build import grid_of
from hjepa.config import Config
from hjepa.device import (
    can_recompute,
    forget_peak,
    free_memory,
    is_out_of_memory,
    peak_memory,
    release_cache,
    resident_memory,
)
from hjepa.distributed import alone
from hjepa.errors import ConfigError
from hjepa.lightning import Fabric
from hjepa.masks import BlockMasks, Masks
from hjepa.model.hjepa import HJEPA
from hjepa.objective import Objective

# Below this, what a batch takes cannot be told from what the process takes anyway.
TELLING_BYTES = {"cuda": 200_000_000, "mps": 3_000_000_000, "cpu": 200_000_000}  # MPS takes it by the gibibyte
# Left alone: other programs, the allocator's gaps, and the steps whose blocks are larger than those tried.
SHARE = {"cuda": 0.92, "mps": 0.8, "cpu": 0.7}
DEFAULT_GLOBAL_BATCH = 256


def settle_batch_size(config: Config, model: HJEPA, fabric: Fabric, saved: dict[str, Any] | None) -> Config:
    """`data.batch_size: auto` as numbers: `global_batch_size` images a step in as few parts as fit into memory.

    Args:
        config: with `auto`.
        model: the model on the CPU, as it was built.
        fabric: device and processes.
        saved: the config of the run that is continued; its numbers stay.

    Raises:
        ConfigError: when not even the smallest part fits, or the batch does not divide into the processes.
    """
    if saved is not None:
        size, parts = saved["data"]["batch_size"], saved["training"]["accumulation_steps"]
    else:
        size = config.data.global_batch_size or DEFAULT_GLOBAL_BATCH
        share = size // fabric.world_size
        if size % fabric.world_size:
            above = -(-size // fabric.world_size) * fabric.world_size
            raise ConfigError(
                f"data.global_batch_size: {size} does not divide into {fabric.world_size} processes; use {above}"
            )
        device = fabric.device
        found = largest_batch(config, model.to(device), device, share, fabric.autocast)
        # Every process has to take the same number of parts.
        fitting = int(fabric.all_gather(torch.tensor(found)).min())
        least = 2 if config.loss.has_image_level else 1
        sizes = [n for n in range(least, min(fitting, share) + 1) if share % n == 0]
        if not sizes and fitting >= least:
            raise ConfigError(
                f"data.global_batch_size: {share} image(s) on a process do not divide into parts of {least} to "
                f"{fitting}; use a multiple of {fabric.world_size * fitting}"
            )
        if not sizes:
            recomputes = can_recompute(device.type, config.model.drop_path_rate)
            less = "set training.use_gradient_checkpointing=true or " if recomputes else ""
            raise ConfigError(
                f"data.batch_size: {least} image(s) do not fit into this device's memory; {less}choose a smaller model"
            )
        parts = share // sizes[-1]
    data = config.data.model_copy(update={"batch_size": size, "global_batch_size": None})
    training = config.training.model_copy(update={"accumulation_steps": parts})
    return config.model_copy(update={"data": data, "training": training})


def largest_batch(config: Config, model: HJEPA, device: torch.device, most: int, autocast: Any) -> int:
    """The largest part of a batch that a training step can be computed in, up to `most` images; 0 if none fits.

    Memory is linear in the images: two sizes that are large enough to tell are tried and the line is drawn to what is
    free. On a GPU the size found is tried as well.

    Args:
        config: the whole of a run.
        model: on the device.
        device: where it is tried.
        most: the largest size of interest.
        autocast: context of the arithmetic.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    objective = Objective(config.loss, config.model.num_hierarchies, model.taps)
    training = model.training

    # Once: what a trial gives back may stay with the allocator, and would hide a part of the next one.
    forget_peak(device)
    # Beside the weights: gradients, which the trial holds too, and the optimizer's two averages, which it does not.
    budget = free_memory(device) * SHARE[device.type] - 2 * weights
    before = resident_memory() if device.type == "cpu" else peak_memory(device)

    def peak(size: int) -> float:
        forget_peak(device)
        try:
            with alone(), autocast():
                # Held while gradients are computed, as in a step.
                output = model(*synthetic_batch(config, size, device))
                losses = objective(output, 0)
            with alone():
                losses.total.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return float("inf")
        finally:
            model.zero_grad()
        return float(peak_memory(device) - before)

    model.train()
    size, last, here = 2, 0.0, peak(2)
    # At least twice: the first holds the gradients as well, which no further image adds to. But only what will fit.
    while (
        size < most
        and here + min(here, 2 * (here - last)) < budget
        and (size == 2 or here - last < TELLING_BYTES[device.type])
    ):
        size, last, here = size * 2, here, peak(size * 2)
    slope = (here - last) / (size / 2) if size > 2 else here / size
    if here == float("inf"):
        fits = size // 2 if size > 2 else 0
    elif slope > 0:
        fits = min(most, int(size + (budget - here) / slope))
    else:
        fits = most if budget > here else 0
    while device.type != "cpu" and fits > size and peak(fits) > budget:
        fits = int(fits * 0.9)
    model.train(training)
    return max(fits, 0)


def settings_that_fit(config: Config, model: HJEPA, fabric: Fabric, automatic: bool) -> str:
    """What to do after a step that ran out of memory, in words that name settings which are accepted.

    Smaller parts give the same step where no loss compares the images of a part, so the run can go on with them.
    Otherwise it can go on with blocks that are computed twice, or not at all.

    Args:
        config: of the run, its batch in numbers.
        model: on the device, whose memory has been given back.
        fabric: device and processes. Among several, half of the part is named without trying: the others are
            waiting in the middle of a step, and a trial would join their sums.
        automatic: whether the user's config leaves the batch to the machine, so that it must be told in numbers.
    """
    release_cache(fabric.device)
    size = config.data.images_per_step
    share = size // fabric.world_size
    tried = share // config.training.accumulation_steps
    recompute = "training.use_gradient_checkpointing=true"
    most = True if config.loss.predicts else "encoder"

    if fabric.world_size > 1:
        found = tried // 2
    else:
        found = largest_batch(config, model, fabric.device, tried - 1, fabric.autocast) if tried > 1 else 0
    least = 2 if config.loss.has_image_level else 1
    smaller = max((n for n in range(least, min(found, tried - 1) + 1) if share % n == 0), default=0)
    batch = f"data.batch_size={size} data.global_batch_size=null " if automatic else ""
    parts = f"{batch}training.accumulation_steps={share // smaller}" if smaller else ""
    if smaller and not config.loss.has_image_level:
        return f"{smaller} fit: continue with --resume {parts}"
    recomputes = can_recompute(fabric.device.type, config.model.drop_path_rate)
    if recomputes and config.training.use_gradient_checkpointing not in (True, most):
        return f"recomputing takes less: continue with --resume {recompute}"
    if smaller:
        return (
            f"{smaller} fit, and loss.type={config.loss.type} compares the images of a part: continue as another run "
            f"with --resume --accept training.accumulation_steps {parts}"
        )
    return "no smaller part does either: start another run with a smaller model or smaller images"


def synthetic_batch(config: Config, size: int, device: torch.device) -> tuple[Tensor, Masks, Tensor | None]:
    """Images of noise and true masks, as the model takes them, for `size` images."""
    masks = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    positions = torch.arange(size).numpy()
    views = [masks.sample(0, 0, f"view{v}", positions) for v in range(config.data.num_views)]
    joined = Masks(*(torch.cat(parts).to(device) for parts in zip(*views, strict=True)))
    side, crops = config.data.image_size, config.data.multicrop.num_local_crops
    small = config.data.local_size(config.model.shape.patch_size)
    return (
        torch.randn(config.data.num_views, size, 3, side, side, device=device),
        joined,
        torch.randn(crops, size, 3, small, small, device=device) if crops else None,
    )
