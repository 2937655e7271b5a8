"""What a person sees of a run: on a terminal, in a file, and on the terminal after the run is gone."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pyte
import pytest
from conftest import SMALL

from hjepa.console import Console
from hjepa.evaluate import show_results

WIDTH, HEIGHT = 100, 30
STEPS = ("data.num_workers=0", "data.batch_size=4", "training.warmup_epochs=0")


class Terminal:
    """A process on a pseudo-terminal, and what a person would see there."""

    def __init__(self, words: list[str], width: int = WIDTH, stderr: IO[str] | None = None, **environment: str) -> None:
        self.screen = pyte.HistoryScreen(width, HEIGHT, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
        self.before = termios.tcgetattr(self.master)
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        kept |= {"TERM": "xterm-256color", **environment}
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=stderr or slave, env=kept, start_new_session=True
        )
        os.close(slave)

    def read(self, until: Callable[[str], bool] = lambda text: False, seconds: float = 90) -> bool:
        """Take in what is drawn until the screen shows something, or the process has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    data = os.read(self.master, 1 << 16)
                except OSError:  # Linux says so when nobody has it open any more
                    data = b""
                if not data:
                    self.process.wait(30)
                    return until(self.text)
                self.raw += data
                self.stream.feed(data)
                if until(self.text):
                    return True
        raise AssertionError(f"not seen in {seconds} s:\n{self.text}")

    @property
    def text(self) -> str:
        """The lines that have scrolled away, and the screen."""
        old = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*old, *self.screen.display)).rstrip()

    def end(self) -> int:
        """Its exit code."""
        self.read()
        code = self.process.wait(30)
        assert termios.tcgetattr(self.master) == self.before
        os.close(self.master)
        return code


def training(*settings: str) -> list[str]:
    return [sys.executable, "-m", "hjepa", "train", *SMALL, *STEPS, *settings]


def drawn_at_the_end(text: str) -> list[str]:
    """Lines of the live view that are still there."""
    return [line for line in text.splitlines() if "ETA" in line or "verdict so far" in line or "images/s" in line]


def is_training(text: str) -> bool:
    return "verdict so far" in text and "k-NN " in text


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    """A run that goes on until it is stopped, and is evaluated after each epoch."""
    return (f"experiment.output_dir={tmp_path / 'run'}", "training.epochs=100000", "evaluation.eval_frequency=1")


def test_a_terminal_shows_where_the_run_is_and_ctrl_c_gives_it_back(settings: tuple[str, ...]) -> None:
    terminal = Terminal(training(*settings))
    assert terminal.read(is_training)
    shown = terminal.text
    assert re.search(r"Training .* \d+/1600000 .* ETA", shown), shown
    assert re.search(r"loss \d+\.\d+, \d+ images/s, epoch \d+/100000, ends \w+", shown), shown
    assert "verdict so far: " in shown
    found = re.search(r"k-NN [\d.]+ %, raw pixels [\d.]+ %, untrained encoder [\d.]+ %, after step \d+", shown)
    assert found, shown
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert drawn_at_the_end(terminal.text) == []
    assert "error: stopped by SIGINT after a save; --resume goes on" in terminal.text
    assert "Starting training..." in terminal.text
    assert re.search(r"^Epoch 1/100000: loss=", terminal.text, re.MULTILINE)
    assert not terminal.screen.cursor.hidden
    assert b"\x1b[?25l" not in terminal.raw  # never hidden, so that no kill can leave it so
    assert b"\x1b[?1049h" not in terminal.raw


@pytest.mark.slow
def test_so_do_sigterm_and_a_failure(settings: tuple[str, ...]) -> None:
    terminal = Terminal(training(*settings))
    assert terminal.read(is_training)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 143
    assert drawn_at_the_end(terminal.text) == []
    again = Terminal(
        training(*settings, "--resume", "training.lr=1e30", "--accept", "training.lr", "training.max_bad_steps=2")
    )
    assert again.end() == 4
    assert drawn_at_the_end(again.text) == []
    assert "error: " in again.text


@pytest.mark.slow
def test_a_narrow_terminal_is_not_spoilt(settings: tuple[str, ...]) -> None:
    terminal = Terminal(training(*settings), width=50)
    assert terminal.read(is_training)
    for _ in range(10):
        terminal.read(lambda text: True)
    assert len(drawn_at_the_end("\n".join(terminal.screen.display))) <= 3
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert drawn_at_the_end(terminal.text) == []


PROGRAM = """
import sys, time
from hjepa.console import Console
with Console() as console:
    bar = console.bar("Training", 50)
    for step in range(1, 51):
        bar.update(step)
        console.status(training=f"loss {1 / step:.3f}", verdict="healthy so far")
        if step % 10 == 0:
            console.say(f"Epoch {step}")
            console.warn(f"of step {step}")
            time.sleep(0.3)
    bar.close()
    console.status(training="", now="evaluating")
    time.sleep(0.3)
    console.table(["", "k-NN"], [["trained encoder", "70.2 %"]])
    if "fail" in sys.argv:
        raise ValueError("no")
"""
SAID = [line for step in range(10, 51, 10) for line in (f"Epoch {step}", f"warning: of step {step}")]
SAID += ["                   k-NN", "trained encoder  70.2 %"]


def program(*words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *words]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_a_terminal_that_wants_plain_lines_gets_those_of_a_file(environment: dict[str, str]) -> None:
    done = subprocess.run(
        program(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == SAID
    terminal = Terminal(program(), **environment)
    assert terminal.end() == 0
    assert terminal.raw.decode().replace("\r\n", "\n") == done.stdout


@pytest.mark.parametrize("width", [40, 100])
def test_what_is_said_scrolls_past_above_what_is_drawn(width: int) -> None:
    terminal = Terminal(program(), width=width)
    assert terminal.read(lambda text: "warning: of step 40" in text and "loss 0.025" in text)
    lines = terminal.text.splitlines()
    (bar,) = (number for number, line in enumerate(lines) if line.startswith("Training"))
    assert lines[bar + 1 :] == ["loss 0.025", "healthy so far"]
    assert terminal.read(lambda text: "evaluating" in text)
    assert terminal.end() == 0
    assert terminal.text.splitlines() == SAID


def test_a_failure_leaves_its_words_alone(tmp_path: Path) -> None:
    terminal = Terminal(program("fail"))
    assert terminal.end() == 1
    lines = terminal.text.splitlines()
    assert lines[: len(SAID)] == SAID
    assert lines[len(SAID)].startswith("Traceback")
    assert lines[-1] == "ValueError: no"


def test_warnings_go_to_their_own_file_while_a_terminal_is_drawn_on(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w") as errors:
        terminal = Terminal(program(), stderr=errors)
        assert terminal.end() == 0
    assert (tmp_path / "errors").read_text().splitlines() == [line for line in SAID if line.startswith("warning")]
    assert terminal.text.splitlines() == [line for line in SAID if not line.startswith("warning")]


@pytest.mark.parametrize(("own", "behind"), [(39.4, True), (28.0, True), (39.5, False), (70.2, False)])
def test_an_encoder_behind_what_costs_nothing_is_said_to_be(
    own: float, behind: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"eval/knn": own, "eval/knn_online": own, "eval/knn_pixels": 39.5, "eval/knn_random": 27.1}
    with Console() as console:
        show_results(console, figures, tmp_path)
    *table, last = capsys.readouterr().out.splitlines()
    assert last == f"Run: {tmp_path}"
    assert table[-1].startswith("Behind what costs nothing: train for longer") is behind
