"""From files to views: `python benchmarks/input.py [FOLDER]`.

Each part of the way alone, beside what is usually done in its place, in turns; then the share of a training step in
which the device waits for its batch. FOLDER holds class folders of images; JPEG files of 500 x 375 are made when it is
not given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images_check import write_photos
from PIL import Image
from plain import ReferenceMasks
from tables import table
from torch import Tensor

from hjepa.build import grid_of
from hjepa.config import Config, load_config
from hjepa.console import Console
from hjepa.data.decode import decode
from hjepa.data.loader import Batch
from hjepa.data.sources import decode_side
from hjepa.data.views import Views, draw_views
from hjepa.data.workers import Loader
from hjepa.device import choose, synchronize
from hjepa.fabric import open_fabric
from hjepa.masks import BlockMasks
from hjepa.optim import Schedules
from hjepa.run import Run, build
from hjepa.step import take_step

STRONG = "{color_jitter: 0.4, hue_jitter: 0.1, grayscale: 0.2, gaussian_blur: 0.5, solarization: 0.1}"
SIDE, IMAGES = 224, 64


def in_rounds(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def torchvision_view(size: int) -> Callable[[Any], Tensor]:
    """One view of one Pillow image, as the field's loaders make it."""
    from torchvision import transforms as t

    return t.Compose(
        [
            t.RandomResizedCrop(size, scale=(0.3, 1.0)),
            t.RandomHorizontalFlip(),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([t.GaussianBlur(11, (0.1, 2.0))], p=0.5),
            t.RandomSolarize(128, p=0.1),
            t.ToTensor(),
            t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def parts_of(config: Config, folder: Path, rounds: int) -> list[list[str]]:
    """A row for each part of the way."""
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:IMAGES]
    side = decode_side(config.data)
    out = np.empty((3, side, side), np.uint8)

    def whole(path: str) -> Any:
        with Image.open(path) as image:
            return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)

    pictures = [whole(path) for path in paths]
    view = torchvision_view(SIDE)
    stored = torch.from_numpy(np.stack([np.asarray(p).transpose(2, 0, 1) for p in pictures]))
    positions, sizes = np.arange(len(paths)), np.full((len(paths), 2), side, np.float32)
    views = Views(config.data.augmentation, SIDE)
    drawn = draw_views(config.data.augmentation, 0, "view0", positions, sizes)
    grid = grid_of(config)
    blocks, reference = BlockMasks(config.masking, grid, 1), ReferenceMasks(config.masking, grid)
    run = made(config)
    batch, device = run.batches[0], run.fabric.device
    steps = count()

    def copied() -> None:
        batch.to(device)
        synchronize(device)

    copy = {} if device.type == "cpu" else {"a batch copied to the device (not pinned)": copied}
    found = in_rounds(
        {
            "a batch of images in memory, views' numbers, masks": lambda: run.batches[next(steps)],
            **copy,
            "decode": lambda: [decode(path, side, out) for path in paths],
            "decode whole, then resize (Pillow)": lambda: [whole(path) for path in paths],
            "draw a view's numbers": lambda: draw_views(config.data.augmentation, 0, "view0", positions, sizes),
            "masks": lambda: blocks.sample(0, next(steps), "view0", positions),
            "masks image by image": lambda: reference.sample(0, next(steps), "view0", positions),
            "a strong view, all images at once": lambda: views(stored, drawn),
            "a strong view, image by image (torchvision)": lambda: [view(picture) for picture in pictures],
        },
        rounds,
    )
    beside = {
        "decode": "decode whole, then resize (Pillow)",
        "masks": "masks image by image",
        "a strong view, all images at once": "a strong view, image by image (torchvision)",
    }
    rows = []
    for name, seconds in found.items():
        ratio = f"{found[beside[name]] / seconds:.2f}" if name in beside else ""
        rows.append([name, f"{len(paths) / seconds:.0f}", ratio])
    return rows


def made(config: Config) -> Run:
    """A run that is ready for its first step."""
    fabric, kind = open_fabric(config)
    run = build(config, fabric, kind, Console(enabled=False), None)
    run.model.train()
    return run


def waiting(words: list[str], seconds: float) -> list[str]:
    """How long steps of a run wait for their batches."""
    config = load_config(None, words)
    run = made(config)
    schedules = Schedules(config.training, config.model.ema, run.batches.steps_per_epoch, 10**6)
    waited = 0.0

    def timed(batches: Iterator[Batch]) -> Iterator[Batch]:
        nonlocal waited
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            yield batch

    batches = timed(iter(Loader(run.batches, 0, 10**6, run.kind.pin_memory)))
    for step in range(5):
        take_step(run, schedules, step, batches)
    synchronize(run.fabric.device)
    waited, start, steps = 0.0, time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        take_step(run, schedules, 5 + steps, batches)
        steps += 1
    synchronize(run.fabric.device)
    took = time.perf_counter() - start
    images = config.data.images_per_step
    return [f"{images * steps / took:.1f}", f"{waited / took:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="class folders of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of steps that are watched")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder
        if folder is None:
            folder = Path(made)
            for name in ("a", "b"):
                (folder / name).mkdir()
                write_photos(folder / name, 200)
        base = [
            f"data.datasets=[{{name: imagefolder, path: {folder}}}]",
            f"data.image_size={SIDE}",
            f"data.augmentation={STRONG}",
            "model.num_hierarchies=1",
            "model.encoder_type=vit_tiny_patch16_224",
            "evaluation.eval_frequency=0",
            "logging.use_tensorboard=false",
        ]
        large = ["model.encoder_type=vit_small_patch16_224", "loss.type=sigreg", "data.num_views=2"]
        large += ["data.multicrop={num_local_crops: 6, local_crop_size: 96}"]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        print(
            table(
                ["part", "images/s of one core", "times as fast"],
                parts_of(load_config(None, [*base, f"data.batch_size={IMAGES}"]), folder, args.rounds),
            )
        )
        torch.set_num_threads(threads)
        rows = []
        batch, loaders = (16, 1) if choose("auto").name == "cpu" else (256, max(1, (os.cpu_count() or 1) - 1))
        beside = f"files, {loaders} loader{'s' * (loaders > 1)}"
        for title, words in (
            ("ViT-Ti, files, in the process", ["data.num_workers=0", "data.cache_gb=0"]),
            (f"ViT-Ti, {beside}", [f"data.num_workers={loaders}", "data.cache_gb=0"]),
            ("ViT-Ti, images in memory", ["data.num_workers=0"]),
            (f"ViT-S, two views and 6 crops, {beside}", [f"data.num_workers={loaders}", "data.cache_gb=0", *large]),
            ("ViT-S, two views and 6 crops, images in memory", ["data.num_workers=0", *large]),
        ):
            more = [f"data.batch_size={batch}", "training.use_amp=auto", *words]
            rows.append([title, *waiting([*base, *more], args.seconds)])
        print("\n" + table(["input", "images/s", "waiting"], rows))


if __name__ == "__main__":
    main()
