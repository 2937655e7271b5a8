"""What the person at the terminal sees: plain lines into a file, a live view of the progress on a terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Each drawing holds the interpreter for 0.6 ms (measured on an AMD EPYC).
_DRAWINGS_PER_SECOND = 4


class Console:
    """Lines and progress of one process; silent on all but the first of a distributed run.

    Bars and the lines under them are drawn on a terminal alone, a few times per second and by a thread of their own;
    what is said scrolls past above them. With `NO_COLOR` or `TERM=dumb` a terminal gets the lines of a file.
    """

    def __init__(self, enabled: bool = True) -> None:
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        colours: Literal["auto"] | None = None if plain else "auto"
        self._rich = _Terminal(highlight=False, soft_wrap=True, quiet=not enabled, color_system=colours)
        self._errors = RichConsole(
            stderr=True, highlight=False, soft_wrap=True, quiet=not enabled, color_system=colours
        )
        self._live = enabled and not plain and sys.stdout.isatty() and self._rich.is_interactive
        self._progress = _View(self._rich, disabled=not self._live)

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line on standard error."""
        # What is drawn has to know of every line on its screen.
        here = self._rich if self._live and sys.stderr.isatty() else self._errors
        here.print(f"warning: {text}", markup=False)

    def bar(self, description: str, total: int, completed: int = 0) -> Bar:
        """A progress bar; shows nothing where there is no terminal."""
        return Bar(self._progress, description, total, completed)

    def status(self, **lines: str) -> None:
        """Lines under the bars, by name; an empty one goes. Shows nothing where there is no terminal."""
        self._progress.lines.update(lines)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """A small table, readable in a file too."""
        table = Table(*columns, box=None, pad_edge=False, show_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        self._rich.print(table)


class Bar:
    """One line of progress."""

    def __init__(self, view: _View, description: str, total: int, completed: int) -> None:
        # Read by the thread that draws: an update costs a step no more than this.
        self.completed, self.total, self.note = completed, total, ""
        self._close = view.follow(self, description)

    def update(self, completed: int, note: str | None = None, total: int | None = None) -> None:
        """Set how far it is; None keeps the note that stands there, and the total."""
        self.completed = completed
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total

    def close(self) -> None:
        """Take the line away."""
        self._close()


class _View(Progress):
    """Bars, and lines of text under them."""

    def __init__(self, console: RichConsole, disabled: bool) -> None:
        self._bars: dict[TaskID, Bar] = {}
        self._bars_lock = threading.Lock()  # rich holds its own while it waits for a drawing
        self.lines: dict[str, str] = {}
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=disabled,
            refresh_per_second=_DRAWINGS_PER_SECOND,
        )

    def follow(self, bar: Bar, description: str) -> Callable[[], None]:
        """Draw a bar, until what is returned is called."""
        task = self.add_task(description, total=bar.total, completed=bar.completed, note=bar.note)
        with self._bars_lock:
            self._bars[task] = bar

        def forget() -> None:
            with self._bars_lock:
                del self._bars[task]
            self.remove_task(task)

        return forget

    def get_renderables(self) -> Iterable[RenderableType]:
        """All that is drawn, from the top."""
        with self._bars_lock:
            for task, bar in self._bars.items():
                self.update(task, completed=bar.completed, total=bar.total, note=bar.note)
        yield from super().get_renderables()
        for line in list(self.lines.values()):
            if line:
                yield Text(line, no_wrap=True, overflow="ellipsis")


class _Terminal(RichConsole):
    """Leaves the cursor where it is seen: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False
