"""Images per second, operations and memory of a training step: `python benchmarks/step.py`.

Ours is the whole step (`hjepa.step.take_step`): views of uint8 images that lie in memory, masks, both encoders,
predictor, loss, clipping, optimizer, average of the weights. `plain` is the same method as reference code writes it
(`plain.py`), on images that are ready. Both have one level, one tap, one view, four blocks of 15 to 20 % and a
predictor of 6 blocks of 384.

A peer from outside the repository is timed in the same turns with `--peer NAME=COMMAND`: its command is called with
`--size --image --patch --batch --amp` and serves as `turns.serve` says.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import count
from typing import Any

import torch
from plain import PlainStep
from tables import GB, table
from torch import Tensor
from turns import in_turns, serve

from hjepa.config import Config, load_config
from hjepa.console import Console
from hjepa.data.workers import Loader
from hjepa.device import choose, synchronize
from hjepa.fabric import open_fabric
from hjepa.flops import flops_per_image
from hjepa.measure import SIZES_OF_BLOCKS
from hjepa.optim import Schedules
from hjepa.run import build
from hjepa.step import take_step

SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}
HEADS = {"Ti": 3, "S": 6, "B": 12, "L": 16}
PATCHES = {32: 4, 96: 8, 128: 16, 224: 16}
# Patches of a step, so that it takes some seconds on two cores; a GPU gets as many times more.
TOKENS = {"Ti": 2048, "S": 1024, "B": 512, "L": 256}
TIMES_ON_GPU = 32
WORKERS_OF_GPU = 8


def config_of(size: str, image: int, patch: int, batch: int, amp: bool, more: list[str]) -> Config:
    """Masked prediction as I-JEPA has it."""
    words = [
        f"model.encoder_type=vit_{SIZES[size]}_patch16_224",
        f"model.patch_size={patch}",
        "model.num_hierarchies=1",
        f"model.target_layers=[{24 if size == 'L' else 12}]",
        f"model.predictor={{depth: 6, embed_dim: 384, num_heads: {HEADS[size]}}}",
        f"data.datasets=[{{name: shapes, length: {4 * batch}}}]",
        f"data.image_size={image}",
        f"data.batch_size={batch}",
        "masking.num_masks=4",
        "masking.mask_scale=[0.15,0.2]",
        "masking.context_scale=[0.85,1]",
        "loss.type=smoothl1",
        "loss.hierarchy_weights=[1]",
        f"training.use_amp={str(amp).lower()}",
        "evaluation.eval_frequency=0",
        "logging.use_tensorboard=false",
        f"data.num_workers={WORKERS_OF_GPU}",
    ]
    return load_config(None, [*words, *more])


def serve_ours(config: Config) -> None:
    """Our step, as a run takes it."""
    fabric, kind = open_fabric(config)
    run = build(config, fabric, kind, Console(), None, sample=2 * config.data.images_per_step)
    run.model.train()
    schedules = Schedules(config.training, config.model.ema, run.batches.steps_per_epoch)
    numbers, on_cpu = count(), fabric.device.type == "cpu"
    # Batches for a GPU are made beside the step, as in a run.
    batches = (
        (run.batches[number] for number in count()) if on_cpu else iter(Loader(run.batches, 0, 10**6, kind.pin_memory))
    )
    serve(
        lambda: take_step(run, schedules, next(numbers), batches),
        facts_of(config, fabric.device),
        warmup=2 if on_cpu and not config.training.use_compile else SIZES_OF_BLOCKS,
        wait=lambda: synchronize(fabric.device),
    )


def serve_plain(config: Config) -> None:
    """The plain step; what the allocator keeps is left at its default."""
    device = torch.device(choose("auto").name)
    serve(PlainStep(config, device), facts_of(config, device), wait=lambda: synchronize(device))


def serve_peak(amp: bool) -> None:
    """The matrix product of a large MLP, forward: what the device can do at all."""
    device = torch.device(choose("auto").name)
    kind = torch.bfloat16 if amp else torch.float32
    rows, inner, columns = (2048, 2048, 2048) if device.type == "cpu" else (8192, 4096, 4096)
    a, b = torch.randn(rows, inner, device=device, dtype=kind), torch.randn(inner, columns, device=device, dtype=kind)

    def product() -> Tensor:
        for _ in range(9):
            a @ b
        return a @ b

    serve(product, {"flops": 10 * 2 * rows * inner * columns}, wait=lambda: synchronize(device))


def facts_of(config: Config, device: torch.device) -> dict[str, Any]:
    """What the table needs to know beside the time."""
    size = config.data.images_per_step
    return {"images": size, "flops": size * flops_per_image(config).total, "device": str(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--images", nargs="+", type=int, default=list(PATCHES), choices=PATCHES)
    parser.add_argument("--batch", type=int, help="images of a step; by the model's size when not given")
    parser.add_argument("--amp", choices=["both", "true", "false"], default="both", help="bfloat16, float32, or both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for our step")
    parser.add_argument("--serve", nargs=6, metavar=("WHAT", "SIZE", "IMAGE", "PATCH", "BATCH", "AMP"))
    args = parser.parse_args()
    if args.serve:
        what, size, image, patch, batch, amp = args.serve
        if what == "peak":
            serve_peak(amp == "true")
            return
        config = config_of(size, int(image), int(patch), int(batch), amp == "true", args.set)
        (serve_ours if what == "ours" else serve_plain)(config)
        return
    rows, times = [], 1 if choose("auto").name == "cpu" else TIMES_ON_GPU
    for image in args.images:
        for size in args.sizes:
            patch = PATCHES[image]
            tokens = (image // patch) ** 2
            batch = args.batch or max(2, times * TOKENS[size] // tokens)
            for amp in ("false", "true") if args.amp == "both" else (args.amp,):
                rows += measure(size, image, patch, batch, amp, args)
                print(*rows[-2 - len(args.peer) :], sep="\n", file=sys.stderr, flush=True)
    print(table(HEAD, rows))


HEAD = [
    "model", "image", "batch", "arithmetic", "step", "GFLOP / image", "images/s", "ours / it", "GFLOP/s", "of peak",
    "GB",
]  # fmt: skip


def measure(size: str, image: int, patch: int, batch: int, amp: str, args: argparse.Namespace) -> list[list[str]]:
    """The rows of one shape: ours, the plain step, and peers."""
    shape = [size, str(image), str(patch), str(batch), amp]
    own = ["--set", *args.set] if args.set else []
    commands = {what: [sys.executable, __file__, *own, "--serve", what, *shape] for what in ("peak", "ours", "plain")}
    for peer in args.peer:
        name, _, command = peer.partition("=")
        words = [f"--size={size}", f"--image={image}", f"--patch={patch}", f"--batch={batch}", f"--amp={amp}"]
        commands[name] = [*shlex.split(command), *words]
    found = in_turns(commands, args.rounds)
    peak = found.pop("peak")
    limit = peak.facts["flops"] / peak.median
    rows = []
    for name, timed in found.items():
        rate = batch / timed.median
        # A pair by pair, so that a machine that slows down slows both.
        ratio = found["ours"].ratio_to(timed)
        flops = found["ours"].facts["flops"] / batch if name == "ours" else None
        rows.append(
            [
                f"ViT-{size}/{patch}", str(image), str(batch), "bfloat16" if amp == "true" else "float32", name,
                f"{flops / 1e9:.1f}" if flops else "", f"{rate:.2f}", "" if name == "ours" else f"{1 / ratio:.2f}",
                f"{flops * rate / 1e9:.0f}" if flops else "", f"{flops * rate / limit:.0%}" if flops else "",
                f"{timed.peak / GB:.2f}",
            ]
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
