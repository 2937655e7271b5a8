"""Draw the pictures of docs/method.md, each by the code that it shows.

    python scripts/draw.py docs/pictures [RUN]

Views, masks, levels and schedules come from the loader, the masks, the model and the optimizer of a run, on the
built-in images. With the folder of a finished run its encoder's features are drawn as well.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import hjepa
from hjepa.build import create_hjepa_from_config, grid_of
from hjepa.config import Config, load_config
from hjepa.data.loader import Batch, Batches
from hjepa.data.sources import open_source, open_training
from hjepa.data.views import Views
from hjepa.grid import Grid, cells
from hjepa.masks import BlockMasks
from hjepa.model.pyramid import spread_taps, taps_of_level
from hjepa.optim import Schedules
from hjepa.report.features import colours_of

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
COLOURS = ("#e6550d", "#3182bd", "#31a354", "#756bb1")
INK, PALE = "#37474f", "#eceff1"
# 16 x 16 patches, three levels, four hidden blocks: the defaults of the method on the built-in images.
SHOWN = ("data.image_size=64", "model.patch_size=4", "model.num_hierarchies=3", "loss.hierarchy_weights=null",
         "masking.num_masks=4", "data.batch_size=8", "data.datasets=[{name: shapes, length: 64}]")  # fmt: skip


def main(out: Path, run: Path | None) -> None:
    plt.rcParams |= {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#90a4ae",
                     "xtick.color": INK, "ytick.color": INK}  # fmt: skip
    save(masks(), out / "masks.png")
    save(image_level(), out / "image-level.png")
    save(levels(), out / "levels.png")
    save(coverage(), out / "coverage.png")
    save(flow(), out / "flow.png")
    save(schedules(), out / "schedules.png")
    if run is not None:
        save(features(run), out / "features.png")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=96, facecolor="white", metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)


def show(axes: Axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def first_batch(config: Config) -> Batch:
    masks = BlockMasks(config.masking, grid_of(config), config.model.num_hierarchies)
    return Batches(config.data, open_training(config.data, 0), masks, config.experiment.seed)[0]


def pixels(images: torch.Tensor, config: Config) -> np.ndarray:
    """Normalised `[..., 3, S, S]` -> `[..., S, S, 3]` in 0..1."""
    augmentation = config.data.augmentation
    mean, std = (torch.tensor(v)[:, None, None] for v in (augmentation.mean, augmentation.std))
    return (images * std + mean).clamp(0, 1).movedim(-3, -1).numpy()


def visible(context: torch.Tensor, grid: Grid, patch: int) -> np.ndarray:
    """`[S, S, 1]`: whether the context encoder sees the pixel."""
    seen = np.zeros(grid.size, bool)
    seen[context.numpy()] = True
    return seen.reshape(grid.height, grid.width).repeat(patch, 0).repeat(patch, 1)[..., None]


def draw_cells(axes: Axes, blocks: torch.Tensor, level: int, grid: Grid, patch: int) -> None:
    """The cells of a level in hidden blocks `[M, h, w]`; in the middle of a block that they do not fill."""
    stride = patch << level
    for block, colour in zip(blocks, COLOURS * 4, strict=False):
        height, width = cells(*block.shape, level)
        top, left = divmod(int(block[0, 0]), grid.width)
        top = top * patch + (block.shape[0] * patch - height * stride) // 2
        left = left * patch + (block.shape[1] * patch - width * stride) // 2
        for i in range(height):
            for j in range(width):
                corner = (left + j * stride - 0.5, top + i * stride - 0.5)
                axes.add_patch(Rectangle(corner, stride, stride, alpha=0.3, color=colour, lw=0))
                axes.add_patch(Rectangle(corner, stride, stride, fill=False, edgecolor=colour, lw=1))


def masks() -> Figure:
    """Views, what the context sees of each, and what each level predicts; colours as they are, for the eye."""
    config = load_config(RECIPE, (*SHOWN, "data.augmentation.color_jitter=0", "data.augmentation.grayscale=0"))
    grid, num_levels = grid_of(config), config.model.num_hierarchies
    patch, batch = config.data.image_size // grid.width, first_batch(config)
    pictures = pixels(batch.render(Views(config.data.augmentation, config.data.image_size))[0], config)
    rows = 3
    figure, axes = plt.subplots(rows, 2 + num_levels, figsize=(1.75 * (2 + num_levels), 1.82 * rows))
    for row in range(rows):
        seen = visible(batch.masks.context[row], grid, patch)
        show(axes[row, 0], pictures[row], "a view" if row == 0 else "")
        show(axes[row, 1], np.where(seen, pictures[row], 0.93), "what the context sees" if row == 0 else "")
        for level in range(num_levels):
            show(axes[row, 2 + level], 0.45 * pictures[row] + 0.55, f"level {level}: predicted" if row == 0 else "")
            draw_cells(axes[row, 2 + level], batch.masks.targets[row], level, grid, patch)
    figure.tight_layout(pad=0.4)
    return figure


def image_level() -> Figure:
    """An image, its views with what the context encoder sees of each, and its local crops."""
    config = load_config(RECIPE, (*SHOWN, "masking.num_masks=1", "data.multicrop.num_local_crops=2"))
    grid, batch, data = grid_of(config), first_batch(config), config.data
    patch, views = data.image_size // grid.width, data.num_views
    drawn = pixels(batch.render(Views(data.augmentation, data.image_size)), config)
    crops = batch.render_crops(Views(data.augmentation, data.local_size(config.model.shape.patch_size)))
    small = pixels(crops, config)
    per_view = batch.masks.context.unflatten(0, (views, -1))
    titles = [
        "the image",
        *(f"view {v + 1}, as seen" for v in range(views)),
        *(f"local crop {c + 1}" for c in range(2)),
    ]
    rows = 3
    figure, axes = plt.subplots(rows, 5, figsize=(8.75, 1.82 * rows))
    for row in range(rows):
        show(axes[row, 0], batch.images[0][row].movedim(0, -1).numpy())
        for view in range(views):
            seen = visible(per_view[view, row], grid, patch)
            show(axes[row, 1 + view], np.where(seen, drawn[view, row], 0.93))
        for crop in range(2):
            axis = axes[row, 3 + crop]
            show(axis, small[crop, row])
            edge = (data.image_size - small.shape[2]) / 2  # at the scale of the views beside it
            axis.set_xlim(-0.5 - edge, small.shape[2] - 0.5 + edge)
            axis.set_ylim(small.shape[2] - 0.5 + edge, -0.5 - edge)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def levels() -> Figure:
    """Which blocks of the encoder each level reads, and the cells that it averages over."""
    config, depth = load_config(RECIPE, SHOWN), 12
    num_levels, grid = config.model.num_hierarchies, grid_of(config)
    taps = spread_taps(depth)
    figure, (left, *grids) = plt.subplots(1, 1 + num_levels, figsize=(8.75, 2.3), width_ratios=[2.6, *[1] * num_levels])
    for level in range(num_levels):
        read = taps[taps_of_level(len(taps), level)]
        for block in range(1, depth + 1):
            colour = COLOURS[level] if block in read else PALE
            left.add_patch(
                FancyBboxPatch(
                    (block - 0.36, -level - 0.3), 0.72, 0.6, boxstyle="round,pad=0.02", fc=colour, ec="white"
                )
            )
        rows, columns = cells(grid.height, grid.width, level)
        axes = grids[level]
        for i in range(rows + 1):
            axes.plot([0, grid.width], [i << level] * 2, color=COLOURS[level], lw=0.8)
            axes.plot([i << level] * 2, [0, grid.height], color=COLOURS[level], lw=0.8)
        axes.set_title(f"level {level}: {rows} x {columns} cells", fontsize=9)
        axes.set_aspect("equal")
        axes.set_axis_off()
    left.set_xlim(0.4, depth + 0.6)
    left.set_ylim(-num_levels + 0.4, 0.6)
    left.set_xticks(range(1, depth + 1))
    left.set_yticks([-level for level in range(num_levels)], [f"level {level}" for level in range(num_levels)])
    left.set_xlabel("block of the target encoder (12 of them); read where it is coloured")
    left.tick_params(length=0)
    for spine in left.spines.values():
        spine.set_visible(False)
    figure.tight_layout(pad=0.4)
    return figure


def coverage() -> Figure:
    """How often each patch is seen and how often it is hidden, on a small grid."""
    config = load_config(RECIPE, (*SHOWN, "model.patch_size=8", "model.num_hierarchies=2"))
    grid, count, steps = grid_of(config), 1000, 50
    sampler = BlockMasks(config.masking, grid, config.model.num_hierarchies)
    seen, hidden = np.zeros(grid.size), np.zeros(grid.size)
    for step in range(steps):
        drawn = sampler.sample(0, step, "view0", np.arange(step * count, (step + 1) * count))
        seen += np.bincount(drawn.context.flatten().numpy(), minlength=grid.size)
        rows = np.zeros((count, grid.size), bool)
        np.put_along_axis(rows, drawn.targets.flatten(1).numpy(), True, axis=1)
        hidden += rows.sum(0)
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 3.2))
    for axis, counted, title in zip(axes, (seen, hidden), ("in the context", "hidden and predicted"), strict=True):
        share = 100 * counted.reshape(grid.height, grid.width) / (count * steps)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(share):
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 55 else INK)
        axis.set_title(f"{title}: % of {count * steps // 1000},000 views", fontsize=9)
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    return figure


def flow() -> Figure:
    """One step as boxes, with the shapes of a forward pass."""
    config = load_config(RECIPE, (*SHOWN, "model.num_hierarchies=2"))
    batch, model = first_batch(config), create_hjepa_from_config(config)
    views = batch.render(Views(config.data.augmentation, config.data.image_size))
    with torch.no_grad():
        result = model(views, batch.masks)
    shape, rows = config.model.shape, batch.masks.context.shape[0]
    context = f"[{rows}, {batch.masks.context.shape[1]}, {shape.embed_dim}]"
    sizes = [" x ".join(map(str, p.shape[1:])) for p in result.predictions]
    boxes = {
        "views": (0.0, 1, f"views\n{list(views.shape)}", PALE),
        "context": (2.3, 2, f"context encoder\nsees what is visible\n{context}", "#bbdefb"),
        "target": (2.3, 0, f"target encoder\nslow average, whole view\n{list(result.target_tokens.shape)}", "#d7ccc8"),
        "predictor": (4.9, 2, f"predictor\nqueries of hidden cells\nwidth {model.predictor.dim}", "#bbdefb"),
        "pyramid": (4.9, 0, "taps, normalised,\naveraged over cells", "#d7ccc8"),
        "loss": (7.5, 1, "distance per level\n" + "\n".join(f"level {i}: {s}" for i, s in enumerate(sizes)), "#ffe0b2"),
        "image": (7.5, 2.6, f"image level: views agree,\nSIGReg\n{list(result.embeddings.shape)}", "#ffe0b2"),
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(9.6, 3.7))
    width, height = 2.1, 0.8
    for x, y, text, colour in boxes.values():
        axes.add_patch(
            FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0.04", fc=colour, ec="#90a4ae")
        )
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8)
    for start, end in (("views", "context"), ("views", "target"), ("context", "predictor"), ("target", "pyramid"),
                       ("predictor", "loss"), ("pyramid", "loss")):  # fmt: skip
        arrow(axes, boxes[start], boxes[end], width)
    arrow(axes, boxes["context"], boxes["image"], width, height)
    axes.add_patch(
        FancyArrowPatch((3.35, 1.55), (3.35, 0.45), arrowstyle="-|>", mutation_scale=10, color="#8d6e63", ls="--")
    )
    axes.text(3.42, 1, "moves a little\nafter each step", fontsize=8, va="center", color="#6d4c41")
    axes.set_xlim(-0.1, 9.7)
    axes.set_ylim(-0.5, 3.1)
    axes.set_axis_off()
    figure.tight_layout(pad=0.2)
    return figure


def arrow(axes: Axes, start: tuple, end: tuple, width: float, over: float = 0.0) -> None:
    """From the right side of a box, or from its top where it goes `over` another."""
    source = (start[0] + width / 2, start[1] + over / 2 + 0.05) if over else (start[0] + width + 0.05, start[1])
    bend = "angle,angleA=90,angleB=180,rad=6" if over else "arc3"
    axes.add_patch(
        FancyArrowPatch(
            source, (end[0] - 0.05, end[1]), arrowstyle="-|>", mutation_scale=10, color=INK, connectionstyle=bend
        )
    )


def schedules() -> Figure:
    """Learning rate and momentum as the optimizer gets them, for a short and a long run."""
    figure, axes = plt.subplots(1, 2, figsize=(8.75, 2.5))
    for steps, colour in ((936, COLOURS[0]), (10_000, COLOURS[1])):
        config = load_config(RECIPE)
        plan = Schedules(config.training, config.model.ema, steps, steps)
        at = np.linspace(0, steps - 1, 400).astype(int)
        axes[0].plot(at / steps, [plan.lr(int(s)) for s in at], color=colour, label=f"{steps:,} steps")
        axes[1].plot(at / steps, [plan.momentum(int(s)) for s in at], color=colour, label=f"{steps:,} steps")
    axes[0].set_title("learning rate", fontsize=9)
    axes[1].set_title("momentum of the target encoder", fontsize=9)
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("part of the run")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(pad=0.4)
    return figure


def features(run: Path) -> Figure:
    """Images of the test part, and each level's features as colour."""
    encoder, count = hjepa.load(run), 6
    saved = load_config(run / "config.yaml")
    read = open_source(saved.data.datasets[0], saved.data, saved.experiment.seed, "val").read(np.arange(count))
    squares = encoder.preprocess.squares(torch.from_numpy(read.images), read.true_sizes)
    found = encoder(squares)
    maps = [*found.levels, found.tokens.unflatten(1, (encoder.grid.height, encoder.grid.width))]
    rows = [("image", pixels(squares, saved))]
    names = [*(f"level {level}" for level in range(len(found.levels))), "final tokens"]
    rows += [(name, colours_of(each)[0] / 255) for name, each in zip(names, maps, strict=True)]
    figure, axes = plt.subplots(len(rows), count, figsize=(8.75, 1.42 * len(rows)))
    for line, (name, pictures) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            show(axis, picture)
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
