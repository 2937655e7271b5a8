"""What processes cost each other: `python benchmarks/processes.py --processes 2 4 8`.

Every process takes steps of as many images (ViT-S/16 at 224 px, `step.py`), on a GPU of its own or on an equal share
of the processors. `one` is alone on the machine. `apart` are so many that know nothing of each other and meet only in
the machine's memory and processors. `together` are so many of one run, as `torchrun` starts them: they average their
gradients at each step, and what they lose beside `apart` is the price of that. All three are timed in turns.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
from pathlib import Path

from tables import GB, table
from turns import Program, median_ratio

from hjepa.device import autocasts, choose


class Group:
    """Programs that take their steps at the same time."""

    def __init__(self, command: list[str], environments: list[dict[str, str]]) -> None:
        self.programs = [Program(command, environment) for environment in environments]

    def ready(self) -> None:
        """Wait for all: those of one run wait for each other."""
        for program in self.programs:
            program.ready()

    def step(self) -> None:
        """Take one each."""
        for program in self.programs:
            program.ask()
        for program in self.programs:
            program.answer()

    def close(self) -> None:
        """End them."""
        for program in self.programs:
            program.hang_up()  # all of them first: those of one run may wait for each other
        for program in self.programs:
            program.close()

    def rates(self, images: int) -> list[float]:
        """Images a second of all of them in each round, `images` being those of a process."""
        rounds = zip(*(program.timed.seconds for program in self.programs), strict=True)
        return [sum(images / seconds for seconds in of_round) for of_round in rounds]

    @property
    def peak(self) -> int:
        """Memory of the largest, in bytes."""
        return max(program.timed.peak for program in self.programs)


def alone(place: int) -> dict[str, str]:
    """The environment of a process that is the only one of its run; on a machine with GPUs, it has one of them."""
    return {"CUDA_VISIBLE_DEVICES": str(place)}


def member(place: int, count: int, port: int) -> dict[str, str]:
    """The environment of a process of one run, as `torchrun` sets it on one machine."""
    numbers = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
    return meeting | {name: str(number) for name, number in numbers.items()}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def measure(count: int, args: argparse.Namespace) -> list[str]:
    """The row of so many processes."""
    kind = choose("auto").name
    batch = args.batch or (256 if kind == "cuda" else 16)
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    amp = autocasts(kind, args.amp if args.amp == "auto" else args.amp == "true")
    step = str(Path(__file__).with_name("step.py"))
    words = ["--set", *args.set] if args.set else []

    def command(images: int) -> list[str]:
        shape = [args.size, str(args.image), str(args.patch), str(images), str(amp).lower()]
        return [sys.executable, step, *words, "--serve", "ours", *shape]

    port = free_port()
    groups: dict[str, Group] = {}
    try:
        groups["one"] = Group(command(batch), [share | alone(0)])
        groups["apart"] = Group(command(batch), [share | alone(place) for place in range(count)])
        members = [share | member(place, count, port) for place in range(count)]
        groups["together"] = Group(command(count * batch), members)
        for group in groups.values():
            group.ready()
        for _ in range(args.rounds):
            for group in groups.values():
                group.step()
    finally:
        for group in groups.values():
            group.close()
    one, apart, together = (groups[name].rates(batch) for name in ("one", "apart", "together"))

    return [
        str(count), str(count * batch), *(f"{statistics.median(rates):.2f}" for rates in (one, apart, together)),
        f"{median_ratio(together, one):.2f}", f"{median_ratio(together, apart):.2f}",
        f"{groups['together'].peak / GB:.2f}",
    ]  # fmt: skip


HEAD = [
    "processes", "images a step", "images/s: one", "apart", "together", "together / one", "together / apart", "GB each",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--size", default="S")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, help="images of a process; 16, or 256 on a GPU, when not given")
    parser.add_argument("--amp", choices=["auto", "true", "false"], default="auto", help="bfloat16, or float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], help="key=value for all")
    args = parser.parse_args()
    print(table(HEAD, [measure(count, args) for count in args.processes]))


if __name__ == "__main__":
    main()
