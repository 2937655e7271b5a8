"""Programs timed in turns: A B C A B C ..., so that what else the machine does meets all of them alike.

Each program is a process of its own, with memory of its own. It says what it is in a line of JSON when it is ready, and
then takes one step for every line on its standard input and answers with the seconds. So a program from outside the
repository can be timed beside ours: `serve` is all that it needs.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

ANSWERS = "BENCHMARK_ANSWERS"  # number of the pipe that a program answers through
LONGEST_END = 30.0  # seconds


def serve(
    step: Callable[[], object], facts: dict[str, Any], warmup: int = 2, wait: Callable[[], None] | None = None
) -> None:
    """Take a step whenever the other process asks for one.

    Args:
        step: what is timed.
        facts: what is known of it, such as its operations per image; plain data.
        warmup: steps before the first that counts.
        wait: until the device has done what it was told.
    """
    for _ in range(warmup):
        step()
    _say(facts)
    for _ in sys.stdin:
        if wait is not None:
            wait()
        start = time.perf_counter()
        step()
        if wait is not None:
            wait()
        _say({"seconds": time.perf_counter() - start, "peak": _peak()})


def _say(words: dict[str, Any]) -> None:
    # Whatever the program prints of its own goes elsewhere.
    os.write(int(os.environ[ANSWERS]), (json.dumps(words) + "\n").encode())


def _peak() -> int:
    """Largest memory so far, in bytes: of the GPU for a program that computes on one, else of the process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak: int = torch.cuda.max_memory_allocated()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Timed:
    """What is known of one program.

    Attributes:
        facts: its own.
        seconds: of each step.
        peak: memory of its process, or of the GPU that it computes on, in bytes.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timed) -> float:
        """Median over the rounds of our seconds by the other's."""
        return median_ratio(self.seconds, other.seconds)


def median_ratio(ours: list[float], others: list[float]) -> float:
    """Median over the rounds, pair by pair, so that a machine that slows down slows both."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


class Program:
    """A process that serves; `ready` comes before its first step."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.command = command
        reading, writing = os.pipe()
        known = os.environ | {ANSWERS: str(writing)} | (environment or {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sys.stderr, env=known, pass_fds=[writing]
        )
        os.close(writing)
        self.answers = os.fdopen(reading)
        self.timed = Timed()

    def ready(self) -> None:
        """Wait until it has said what it is."""
        self.timed.facts = self._answer()

    def step(self) -> None:
        """Take one."""
        self.ask()
        self.answer()

    def ask(self) -> None:
        """Let it take a step, without waiting for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def answer(self) -> None:
        """Wait for the step it was asked for."""
        answer = self._answer()
        self.timed.seconds.append(answer["seconds"])
        self.timed.peak = answer["peak"]

    def hang_up(self) -> None:
        """Tell it that no step will follow."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """End the process, also one that waits for another that has failed."""
        self.hang_up()
        try:
            self.process.wait(LONGEST_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)}: ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def in_turns(commands: dict[str, list[str]], rounds: int = 5) -> dict[str, Timed]:
    """Time all programs, one step of each in every round."""
    programs: dict[str, Program] = {}
    try:
        for name, command in commands.items():
            programs[name] = Program(command)
            programs[name].ready()
        for _ in range(rounds):
            for program in programs.values():
                program.step()
    finally:
        for program in programs.values():
            program.close()
    return {name: program.timed for name, program in programs.items()}
