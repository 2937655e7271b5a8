"""Train, and leave what this process has in rank<r>.pt.

`poison=<step>` makes the last process's images infinite; `fits=<n>` lets no more than n images fit on its device;
`resume=1` continues what is there; `elsewhere=1` gives the last process a folder of its own.
"""

import os
import sys
from pathlib import Path

import torch

import hjepa.memory
import hjepa.train
from hjepa.config import load_config
from hjepa.data.loader import Batch
from hjepa.data.views import Views
from hjepa.run import Run

torch.set_num_threads(1)
out, *settings = sys.argv[1:]
ours = {
    name: int(value)
    for name, _, value in (text.partition("=") for text in settings)
    if name in ("poison", "fits", "resume", "elsewhere")
}
settings = [text for text in settings if text.partition("=")[0] not in ours]
if "elsewhere" in ours and os.environ["RANK"] == "1":
    settings.append(f"experiment.output_dir={out}/elsewhere")
config = load_config(None, settings)
positions: list[int] = []
render = Batch.render


def is_last() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def recorded(self: Batch, views: Views) -> torch.Tensor:
    positions.extend(self.positions.tolist())
    images = render(self, views)
    if "poison" not in ours or not is_last():
        return images
    step = min(positions[-len(self.positions) :]) // config.data.images_per_step
    return images * float("inf") if step == ours["poison"] else images


Batch.render = recorded  # type: ignore[method-assign]
largest_batch = hjepa.memory.largest_batch
hjepa.memory.largest_batch = lambda *args: ours["fits"] if "fits" in ours and is_last() else largest_batch(*args)
fit = hjepa.train.fit


def fit_and_tell(run: Run) -> None:
    fit(run)
    state = {
        "weights": run.model.state_dict(),
        "positions": positions,
        "bad_steps": run.progress.bad_steps,
        "step": run.progress.step,
        "total": run.progress.total,
        "batch": (run.config.data.batch_size, run.config.training.accumulation_steps),
    }
    torch.save(state, Path(out) / f"rank{run.fabric.global_rank}.pt")


hjepa.train.fit = fit_and_tell
hjepa.train.train(config, resume=bool(ours.get("resume")))
