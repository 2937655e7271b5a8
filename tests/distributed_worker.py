"""Train, and leave what this process has in rank<r>.pt; `poison=<step>` makes the last process's images infinite."""

import sys
from pathlib import Path

import torch

import hjepa.train
from hjepa.config import load_config
from hjepa.data.loader import Batch
from hjepa.data.views import Views

torch.set_num_threads(1)
out, *settings = sys.argv[1:]
poison = next((int(text.split("=")[1]) for text in settings if text.startswith("poison=")), None)
config = load_config(None, [text for text in settings if not text.startswith("poison=")])
positions: list[int] = []
render = Batch.render


def recorded(self: Batch, views: Views) -> torch.Tensor:
    positions.extend(self.positions.tolist())
    images = render(self, views)
    last = torch.distributed.is_initialized() and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    step = min(positions[-len(self.positions) :]) // config.data.batch_size
    return images * float("inf") if last and step == poison else images


Batch.render = recorded  # type: ignore[method-assign]
fit = hjepa.train.fit


def fit_and_tell(run: hjepa.train.Run) -> None:
    fit(run)
    state = {
        "weights": run.model.state_dict(),
        "positions": positions,
        "bad_steps": run.progress.bad_steps,
    }
    torch.save(state, Path(out) / f"rank{run.fabric.global_rank}.pt")


hjepa.train.fit = fit_and_tell
hjepa.train.train(config)
