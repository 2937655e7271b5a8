"""Draw what one batch looks like: views, what the context sees, and what each level predicts.

    python scripts/draw_masks.py docs/masks.png [key=value ...]

The picture in the README is made by the loader, the views and the masks of a run, not by hand.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hjepa.build import grid_of
from hjepa.config import load_config
from hjepa.data.loader import Batches
from hjepa.data.sources import open_training
from hjepa.data.views import Views
from hjepa.grid import cells
from hjepa.masks import BlockMasks

COLOURS = ("#e6550d", "#3182bd", "#31a354", "#756bb1")


def show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def main(out: Path, overrides: list[str]) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    config = load_config(
        recipe, ["data.num_views=1", "data.augmentation.color_jitter=0", "data.augmentation.grayscale=0", *overrides]
    )
    grid, levels = grid_of(config), config.model.num_hierarchies
    patch = config.data.image_size // grid.width
    batches = Batches(
        config.data, open_training(config.data, 0), BlockMasks(config.masking, grid, levels), config.experiment.seed
    )
    batch = batches[0]
    images = batch.render(Views(config.data.augmentation, config.data.image_size))[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.data.augmentation.mean, config.data.augmentation.std))
    pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    rows = 3
    figure, axes = plt.subplots(rows, 2 + levels, figsize=(2.2 * (2 + levels), 2.35 * rows))
    for row in range(rows):
        seen = np.zeros(grid.size, bool)
        seen[batch.masks.context[row].numpy()] = True
        visible = seen.reshape(grid.height, grid.width).repeat(patch, 0).repeat(patch, 1)[..., None]
        show(axes[row, 0], pictures[row], "a view" if row == 0 else "")
        show(axes[row, 1], np.where(visible, pictures[row], 0.93), "what the context sees" if row == 0 else "")
        for level in range(levels):
            place = axes[row, 2 + level]
            stride = patch << level
            show(place, 0.45 * pictures[row] + 0.55, f"level {level}: cells predicted" if row == 0 else "")
            for block, colour in zip(batch.masks.targets[row], COLOURS * 4, strict=False):
                height, width = cells(*block.shape, level)
                # Cells lie in the middle of the block when they do not fill it.
                top, left = divmod(int(block[0, 0]), grid.width)
                top = top * patch + (block.shape[0] * patch - height * stride) // 2
                left = left * patch + (block.shape[1] * patch - width * stride) // 2
                for i in range(height):
                    for j in range(width):
                        corner = (left + j * stride - 0.5, top + i * stride - 0.5)
                        box = Rectangle(corner, stride, stride, fill=True, alpha=0.25, color=colour, lw=0)
                        edge = Rectangle(corner, stride, stride, fill=False, edgecolor=colour, lw=1)
                        place.add_patch(box)
                        place.add_patch(edge)
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
