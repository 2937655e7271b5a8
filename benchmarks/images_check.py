"""What do the checks of image files cost? Guarded against plain decoding of the same files, taken in turns.

    python benchmarks/images_check.py ./photos              # any nested folder of images
    python benchmarks/images_check.py                       # 400 JPEG files of 500 x 375 pixels, made on the spot

Plain is what decoding itself takes: open, reduce, convert, squeeze. Guarded is what training reads with
(`FileSource.read`): the list of formats, the size limit, orientation, transparency and depth, the exact reduction, the
note of the file being read, and the account of unreadable ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hjepa.data.files import FolderSource

SIDE = 256


def plain(path: str, side: int) -> np.ndarray:
    with Image.open(path) as image:
        image.draft(None, (side, side))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        rgb = rgb.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.asarray(rgb).transpose(2, 0, 1)


def write_photos(folder: Path, count: int = 400) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="images; made on the spot when not given")
    parser.add_argument("--images", type=int, default=400, help="how many of them")
    parser.add_argument("--rounds", type=int, default=25, help="turns of each")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory() as made:
        source = FolderSource(given.folder or write_photos(Path(made)), SIDE)
        source.reading = np.full(1, -1)
        parts = np.array_split(np.arange(min(given.images, len(source))), max(1, given.images // 32))
        times: dict[str, list[float]] = {"plain": [], "guarded": []}
        for turn in range(given.rounds + 1):
            spent = dict.fromkeys(times, 0.0)
            for number, part in enumerate(parts):
                # Side by side, and neither always the second: a machine is not as fast a second later.
                for name in sorted(times, reverse=bool((turn + number) % 2)):
                    start = time.process_time()
                    if name == "guarded":
                        source.read(part)
                    else:
                        out = np.empty((len(part), 3, SIDE, SIDE), np.uint8)
                        for row, i in enumerate(part):
                            out[row] = plain(source.paths[i], SIDE)
                    spent[name] += time.process_time() - start
            for name in times if turn else ():
                times[name].append(spent[name] / sum(map(len, parts)))
    for name, seconds in times.items():
        print(f"{name:8} {1e3 * np.median(seconds):.3f} ms an image (fastest turn {1e3 * min(seconds):.3f})")
    ratios = np.array(times["guarded"]) / np.array(times["plain"])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(f"guarded / plain: {middle:.4f} (quartiles {low:.4f} to {high:.4f} of {len(ratios)} turns)")


if __name__ == "__main__":
    main()
