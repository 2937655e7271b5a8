"""What each part of the method is worth at equal wall-clock: `python benchmarks/ladder.py --minutes 10 --seeds 1 2 3`.

Every arm is the same recipe with one thing more than the arm above it, or a control of it; the last one is the recipe
itself, which takes what two views make possible: half of each is seen, every fourth image predicted. All train for the
same time: the steps of all arms are timed first, in turns (`seconds.json`, which is kept), and each takes as many as
fit, schedules included. So what else the machine does later changes nothing, as long as it is quiet while steps are
timed. Evaluation comes on top. A run that is there already is not repeated, and one that was cut off is resumed. The
table is printed and written beside the runs as Markdown, with a plot. With `--curve 2`, runs are probed every second
epoch, too, and k-NN is drawn over the minutes. With `--jobs 2`, two runs share the machine's processors, half each.

Selection belongs on a part of train: give a source whose test part is one (for class folders without train/ and val/, a
tenth of each class is held out).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from plain import ReferenceMasks
from torch import Tensor

from hjepa.build import grid_of, run_path
from hjepa.config import Config, load_config
from hjepa.console import Console
from hjepa.fabric import open_fabric
from hjepa.flops import flops_per_image
from hjepa.grid import pool
from hjepa.measure import time_steps
from hjepa.model.hjepa import Output
from hjepa.objective import Losses, Objective
from hjepa.run import Run, build
from hjepa.runfolder import METRICS, RunFolder, read_metrics
from hjepa.train import fit, plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUNDS, ROUND_SECONDS = 4, 4.0


class PooledObjective(Objective):
    """A coarse loss on the fine level's own prediction: no queries, no deeper taps, nothing new to know."""

    def __call__(self, output: Output, seed: int) -> Losses:
        losses = super().__call__(output, seed)
        fine, target = output.predictions[0], output.targets[0]
        side = fine.shape[-1]

        def coarse(maps: Tensor) -> Tensor:
            return pool(maps.flatten(-2), 1)

        wanted = F.layer_norm(coarse(target).unflatten(-1, (-1, side)), (side,)).flatten(-2)
        pooled = self._distance(coarse(fine), wanted).mean()
        return Losses(losses.total + 0.5 * pooled, losses.terms | {"pooled": pooled.detach()})


def reference_masks(run: Run) -> None:
    """A0."""
    run.batches.masks = ReferenceMasks(run.config.masking, grid_of(run.config))  # type: ignore[assignment]


def same_tap_thrice(run: Run) -> None:
    """A2c: as wide an output as with three taps, all of them the last block's."""
    run.model.taps = (run.model.taps[-1],) * len(run.model.taps)
    run.objective = Objective(run.config.loss, run.model.num_levels, run.model.taps)


def pooled_loss(run: Run) -> None:
    """A3c."""
    run.objective = PooledObjective(run.config.loss, run.model.num_levels, run.model.taps)


@dataclass(frozen=True)
class Arm:
    """One rung.

    Attributes:
        title: what it is.
        overrides: of the recipe.
        change: what no setting can say.
    """

    title: str
    overrides: tuple[str, ...]
    change: Callable[[Run], None] | None = None


MASKS = ("masking.num_masks=4", "masking.mask_scale=[0.15,0.2]", "masking.context_scale=[1,1]", "loss.predict_every=1")
TAPS = ("loss.type=smoothl1", "data.num_views=1", "model.num_hierarchies=1", "loss.hierarchy_weights=[1]", *MASKS)
LEVELS = ("model.num_hierarchies=2", "loss.hierarchy_weights=[1,0.5]", *MASKS)
ALONE = ("model.use_target_encoder=false", "masking.num_masks=0", "loss.hierarchy_weights=[0,0]")


def arms(depth: int) -> dict[str, Arm]:
    """The ladder of the design, section 7, for an encoder of `depth` blocks."""
    last = f"model.target_layers=[{depth}]"
    return {
        "A0": Arm("flat, reference masks", (*TAPS, last), reference_masks),
        "A1": Arm("flat", (*TAPS, last)),
        "A2": Arm("+ taps", TAPS),
        "A2c": Arm("last tap thrice", TAPS, same_tap_thrice),
        "A3": Arm("+ coarse level", (*LEVELS, "data.num_views=1", "loss.type=smoothl1")),
        "A3c": Arm("pooled loss, same head", TAPS, pooled_loss),
        "A4": Arm("+ SIGReg, one view", (*LEVELS, "data.num_views=1", "loss.type=sigreg")),
        "A4v": Arm("+ a second view", (*LEVELS, "data.num_views=2", "loss.type=sigreg")),
        "A5": Arm("the recipe: half views, few images predicted", ()),
        "A5f": Arm("the recipe, every image predicted", ("loss.predict_every=1",)),
        "A5c": Arm("image level alone, whole views", (*ALONE, "masking.context_scale=[1,1]")),
        "A5h": Arm("image level alone, half of each view", (*ALONE, "masking.context_scale=[0.5,0.5]")),
    }


def build_arm(name: str, config: Config, console: Console, folder: RunFolder | None) -> Run:
    """The run of an arm, to be resumed where it was cut off."""
    fabric, kind = open_fabric(config)
    run = build(config, fabric, kind, console, folder, resume=folder is not None)
    change = arms(config.model.shape.depth)[name].change
    if change is not None:
        change(run)
    return run


def time_arms(configs: dict[str, Config], known: dict[str, float]) -> dict[str, float]:
    """Seconds of a step of every arm, the least of some rounds; those already known stay as they are."""
    with Console() as console:
        runs = {name: build_arm(name, config, console, None) for name, config in configs.items() if name not in known}
        times = [{name: time_steps(run, ROUND_SECONDS).usual for name, run in runs.items()} for _ in range(ROUNDS)]
    return known | {name: min(of_round[name] for of_round in times) for name in runs}


def run_arm(name: str, config: Config, steps: int) -> None:
    """Train one arm for so many steps and leave `result.json` in its folder."""
    folder = RunFolder(run_path(config), config.experiment.name, config.logging)
    with Console() as console:
        run = build_arm(name, config, console, folder)
        flops = flops_per_image(config).total
        run.progress.total = run.progress.total or steps
        plan(run)
        fit(run)
    folder.close()
    steps = run.progress.step
    result: dict[str, float | str] = {"steps": steps, "images": steps * run.batches.batch_size, "gflops": flops / 1e9}
    result["verdict"] = run.verdict
    (run_path(config) / "result.json").write_text(json.dumps(result | run.results))


COLUMNS = (
    ("knn", "eval/knn"),
    ("knn online", "eval/knn_online"),
    ("linear", "eval/linear"),
    ("linear online", "eval/linear_online"),
    ("knn taps", "eval/knn_level0"),
    ("linear taps", "eval/linear_level0"),
    ("knn level 1", "eval/knn_level1"),
    ("linear level 1", "eval/linear_level1"),
    ("patch where", "eval/patch_where"),
    ("patch what", "eval/patch_what"),
    ("knn pixels", "eval/knn_pixels"),
    ("knn untrained", "eval/knn_random"),
    ("images", "images"),
    ("GFLOP / image", "gflops"),
)


def table(results: dict[str, list[dict[str, float]]], titles: dict[str, str]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| arm | | seeds | " + " | ".join(name for name, _ in COLUMNS) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for arm, runs in results.items():
        cells = []
        for _, key in COLUMNS:
            values = [run[key] for run in runs if key in run]
            spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 and key.startswith("eval") else ""
            digits = 0 if key == "images" else 1 if key.startswith("eval") else 3
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "-")
        lines.append(f"| {arm} | {titles[arm]} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Titles of figures; a panel is drawn where every run has its figure.
PANELS = {"eval/knn": "k-NN, %", "eval/linear": "linear probe, %", "eval/patch_what": "class of a patch, %"}


def mark_baselines(axes: Axes, run: dict[str, float], key: str) -> None:
    """What costs nothing, by the same figure."""
    axes.axhline(run[f"{key}_pixels"], color="grey", linestyle="--", label="raw pixels")
    axes.axhline(run[f"{key}_random"], color="grey", linestyle=":", label="untrained")


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Every seed by arm, whole images and single patches, beside their baselines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [key for key in PANELS if all(key in run for runs in results.values() for run in runs)]
    figure, grid = plt.subplots(
        1, len(panels), figsize=((0.5 * len(results) + 1.8) * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    first = next(iter(results.values()))[0]
    for axes, key in zip(grid[0], panels, strict=True):
        for name, mark, colour, label in ((key, "o", "C0", "target"), (f"{key}_online", "x", "C1", "online")):
            points = [(i, run[name]) for i, runs in enumerate(results.values()) for run in runs if name in run]
            if points:
                axes.plot(*zip(*points, strict=True), mark, color=colour, label=label)
        mark_baselines(axes, first, key)
        axes.set_xticks(range(len(results)), list(results))
        axes.set_title(PANELS[key])
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def plot_curves(curves: dict[str, list[list[tuple[float, float]]]], first: dict[str, float], path: Path) -> None:
    """k-NN of every run over the minutes of its training; one colour an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for colour, (arm, runs) in enumerate(curves.items()):
        for i, points in enumerate(runs):
            axes.plot(*zip(*points, strict=True), ".-", color=f"C{colour}", label=None if i else arm)
    mark_baselines(axes, first, "eval/knn")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel(PANELS["eval/knn"])
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10.yaml", help="the recipe")
    parser.add_argument("--minutes", type=float, default=10, help="for each arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--arms", nargs="+", default=["A0", "A1", "A2", "A2c", "A3", "A3c", "A4", "A4v", "A5", "A5c", "A5h"]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value for all arms")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--curve", type=int, metavar="EPOCHS", help="probe so often, not only at the end")
    parser.add_argument("--time", action="store_true", help="only time the steps of the arms")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    def config_of(arm: str, seed: int) -> Config:
        base = load_config(args.config, args.set)
        words = [*args.set, *arms(base.model.shape.depth)[arm].overrides, f"experiment.seed={seed}"]
        words += [f"experiment.output_dir={args.out / f'{arm}-{seed}'}", "training.epochs=null"]
        words += [f"evaluation.eval_frequency={args.curve or 100000}", "training.max_time=1000h"]
        return load_config(args.config, words)

    timings = args.out / "seconds.json"
    known: dict[str, float] = json.loads(timings.read_text()) if timings.exists() else {}
    if args.one:
        arm, seed = args.one
        run_arm(arm, config_of(arm, int(seed)), max(1, round(60 * args.minutes / known[arm])))
        return
    if args.time:
        known = time_arms({arm: config_of(arm, args.seeds[0]) for arm in args.arms}, known)
        args.out.mkdir(parents=True, exist_ok=True)
        timings.write_text(json.dumps(known, indent=1))
        return
    titles = {name: arm.title for name, arm in arms(load_config(args.config, args.set).model.shape.depth).items()}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def again(*words: str) -> None:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *words], check=True, env=environment)

    if not known.keys() >= set(args.arms):
        again("--time")

    def result(arm: str, seed: int) -> dict[str, float]:
        path = run_path(config_of(arm, seed)) / "result.json"
        if not path.exists():
            again("--one", arm, str(seed))
        found: dict[str, float] = json.loads(path.read_text())
        return found

    # Seed by seed, so that a ladder that is cut off has whole rows.
    wanted = [(arm, seed) for seed in args.seeds for arm in args.arms]
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in args.arms}
    text = ""
    with ThreadPoolExecutor(args.jobs) as pool:
        for (arm, _), found in zip(wanted, pool.map(lambda w: result(*w), wanted), strict=True):
            results[arm].append(found)
            text = table({name: runs for name, runs in results.items() if runs}, titles)
            (args.out / "ladder.md").write_text(text + "\n")
    print(text)
    plot(results, args.out / "ladder.png")

    def curve(arm: str, seed: int) -> list[tuple[float, float]]:
        _, probed, _ = read_metrics(run_path(config_of(arm, seed)) / METRICS)
        return [(step * known[arm] / 60, values["knn"]) for step, values in probed.items() if values["knn"] is not None]

    curves = {arm: [points for seed in args.seeds if len(points := curve(arm, seed)) > 1] for arm in args.arms}
    curves = {arm: runs for arm, runs in curves.items() if runs}
    if curves:
        plot_curves(curves, next(iter(results.values()))[0], args.out / "curve.png")


if __name__ == "__main__":
    main()
