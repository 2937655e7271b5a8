"""All benchmarks, into `docs/performance.md`: `make bench`, or `python benchmarks/bench.py step input`.

Each part is a program of its own; the tables that it prints replace those between its two marks in the document. What
is written around them stays. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
PARTS = {
    "step": ["step.py"],
    "costs": ["costs.py"],
    "input": ["input.py"],
    "start": ["start.py"],
    "growth": ["growth.py"],
    "processes": ["processes.py"],
    "evaluation": ["evaluation.py"],
    "checkpointing": ["checkpointing.py", "configs/quickstart.yaml"],
}


def machine() -> str:
    """What the figures were taken on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}; {date.today().isoformat()}"


def put(text: str, part: str, words: str) -> str:
    """The document with other words between the marks of a part."""
    first, last = f"<!-- {part} -->", f"<!-- end of {part} -->"
    before, found, rest = text.partition(first)
    if not found:
        return f"{text.rstrip()}\n\n## {part.capitalize()}\n\n{first}\n{words}\n{last}\n"
    return f"{before}{first}\n{words}\n{last}{rest.partition(last)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which; all when none is named")
    parser.add_argument("--peer", action="append", default=[], help="see step.py")
    args = parser.parse_args()
    for part in args.parts or PARTS:
        program, *words = PARTS[part]
        if part == "step":
            words += [f"--peer={peer}" for peer in args.peer]
        command = [sys.executable, str(HERE / program), *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        text = DOCUMENT.read_text() if DOCUMENT.exists() else "# Performance\n"
        DOCUMENT.write_text(put(text, part, f"\n{machine()}\n\n{done.stdout.strip()}\n"))
        print(f"{part}: written to {DOCUMENT}", file=sys.stderr)


if __name__ == "__main__":
    main()
