"""What each setting costs, and how a step grows: `python benchmarks/costs.py`.

Every row is the base with one setting changed; both are timed in turns (`turns.py`), each in a process of its own. The
base is a ViT-S/16 at 224 px in bfloat16: one level, three taps, one view, four blocks, a predictor of 6 blocks of 384.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tables import GB, table
from turns import Timed, in_turns

BASE = ("model.target_layers=null", "data.augmentation={color_jitter: 0, grayscale: 0, gaussian_blur: 0}")
FLOAT32 = ("training.use_amp=false",)
TWO = ("data.num_views=2", "loss.type=smoothl1")
VIEWS = ("data.num_views=2", "loss.type=sigreg")
LEVELS = ("model.num_hierarchies=3", "loss.hierarchy_weights=[1,0.5,0.25]")


@dataclass(frozen=True)
class Change:
    """One row.

    Attributes:
        title: what is changed.
        words: of the config.
        shape: image side, patch side and batch where they are not the base's.
        base: words of what the row is compared with, beside the base's own.
        base_shape: the same of its shape.
    """

    title: str
    words: tuple[str, ...] = ()
    shape: dict[str, int] = field(default_factory=dict)
    base: tuple[str, ...] = ()
    base_shape: dict[str, int] = field(default_factory=dict)


SWITCHES = (
    Change("float32 (`training.use_amp: false`)", FLOAT32),
    Change("fused attention (`model.use_flash_attention: true`)", ("model.use_flash_attention=true",)),
    Change(
        "fused attention in float32",
        ("model.use_flash_attention=true",),
        base=(*FLOAT32, "model.use_flash_attention=false"),
    ),
    Change("compiled blocks (`training.use_compile: true`)", ("training.use_compile=true",)),
    Change("compiled blocks in float32", ("training.use_compile=true",), base=FLOAT32),
    Change("rotary positions (`model.rope`)", ("model.rope.use_rope=true",)),
    Change("LayerScale", ("model.use_layerscale=true",)),
    Change("one tap in place of three", ("model.target_layers=[12]",)),
    Change("two levels", ("model.num_hierarchies=2", "loss.hierarchy_weights=[1,0.5]")),
    Change("three levels", LEVELS),
    Change("FPN, of three levels", (*LEVELS, "model.fpn.use_fpn=true"), base=LEVELS),
    Change("cross-attention in the predictor", ("model.predictor.attention=cross",)),
    Change("predictor of 192", ("model.predictor={depth: 6, embed_dim: 192, num_heads: 3}",)),
    Change("two views", TWO),
    Change("an image level (SIGReg), of two views", VIEWS, base=TWO),
    Change("an image level (VICReg), of two views", ("data.num_views=2", "loss.type=combined"), base=TWO),
    Change("two views, every 4th image predicted", (*VIEWS, "loss.predict_every=4"), base=VIEWS),
    Change(
        "two views and 6 local crops of 96 px",
        (*VIEWS, "data.multicrop={num_local_crops: 6, local_crop_size: 96}"),
        base=VIEWS,
    ),
    Change("Muon (`training.optimizer`)", ("training.optimizer=muon",)),
    Change(
        "colour jitter, greyscale, blur",
        ("data.augmentation={color_jitter: 0.4, hue_jitter: 0.1, grayscale: 0.2, gaussian_blur: 0.5}",),
    ),
)

LARGE = {"batch": 64}  # so that activations, not libraries and weights, are most of the memory
RECOMPUTED = tuple(
    Change(
        f"{words}, {'bfloat16' if amp == 'true' else 'float32'}",
        (f"training.use_gradient_checkpointing={blocks}", f"training.use_amp={amp}"),
        LARGE,
        (f"training.use_amp={amp}",),
        LARGE,
    )
    for blocks, words, amp in (
        ("encoder", "of the encoder", "true"),
        ("predictor", "of the predictor", "true"),
        ("true", "of both", "true"),
        ("true", "of both", "false"),
    )
)

GROWTH = (
    *(Change(f"{n} images a step", shape={"batch": n}) for n in (8, 32, 64)),
    *(Change(f"{(side // 16) ** 2} patches ({side} px)", shape={"image": side}) for side in (112, 160, 320)),
    *(Change(f"{n} views", (f"data.num_views={n}", "loss.type=smoothl1")) for n in (2, 4)),
    *(
        Change(f"{n} levels", (f"model.num_hierarchies={n}", f"loss.hierarchy_weights={[0.5**k for k in range(n)]}"))
        for n in (2, 3)
    ),
)


class Costs:
    """Programs that are compared with the base, each row in turns with it."""

    def __init__(self, size: str, image: int, patch: int, batch: int, rounds: int) -> None:
        self.size, self.rounds = size, rounds
        self.shape = {"image": image, "patch": patch, "batch": batch}

    def pair(self, change: Change) -> tuple[Timed, Timed]:
        """The changed step and what it is compared with."""
        commands = {
            "changed": self.command({**self.shape, **change.shape}, (*change.base, *change.words)),
            "base": self.command({**self.shape, **change.base_shape}, change.base),
        }
        found = in_turns(commands, self.rounds)
        return found["changed"], found["base"]

    def command(self, shape: dict[str, int], words: tuple[str, ...]) -> list[str]:
        """Of a program that takes our step."""
        place = str(Path(__file__).with_name("step.py"))
        numbers = [str(shape[name]) for name in ("image", "patch", "batch")]
        return [sys.executable, place, "--serve", "ours", self.size, *numbers, "true", "--set", *BASE, *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="rows whose title holds one of these words")
    args = parser.parse_args()
    costs = Costs(args.size, args.image, args.patch, args.batch, args.rounds)
    for head, changes in (("setting", SWITCHES), ("blocks computed twice, 64 images", RECOMPUTED), ("growth", GROWTH)):
        rows = []
        for change in changes:
            if args.only and not any(word in change.title for word in args.only):
                continue
            found, base = costs.pair(change)
            images = found.facts["images"]
            flops = found.facts["flops"] / base.facts["flops"] * base.facts["images"] / images
            time = found.ratio_to(base) * base.facts["images"] / images
            rows.append(
                [
                    change.title, f"{images / found.median:.1f}", f"{time:.2f}", f"{flops:.2f}",
                    f"{found.peak / GB:.2f}", f"{found.peak / base.peak:.2f}",
                ]
            )  # fmt: skip
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
        if rows:
            columns = [head, "images/s", "time an image, by the base's", "operations", "GB", "by the base's"]
            print(table(columns, rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
