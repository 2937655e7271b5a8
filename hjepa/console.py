"""What the person at the terminal sees: plain lines into a file, a progress bar with an ETA on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Console:
    """Lines and progress of one process; silent on all but the first of a distributed run."""

    def __init__(self, enabled: bool = True) -> None:
        self._rich = RichConsole(highlight=False, soft_wrap=True, quiet=not enabled)
        self._errors = RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=not enabled)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._rich,
            transient=True,
            disable=not (enabled and sys.stdout.isatty()),
        )

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
        self._errors.print(f"warning: {text}", markup=False)

    def bar(self, description: str, total: int, completed: int = 0) -> Bar:
        """A progress bar; shows nothing where there is no terminal."""
        return Bar(self._progress, description, total, completed)

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

    def __init__(self, progress: Progress, description: str, total: int, completed: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, completed=completed, note="")

    def update(self, completed: int, note: str | None = None, total: int | None = None) -> None:
        """Show how far it is; None keeps the note that stands there, and the total."""
        self._progress.update(self._task, completed=completed, total=total)
        if note is not None:
            self._progress.update(self._task, note=note)

    def close(self) -> None:
        """Take the line away."""
        self._progress.remove_task(self._task)
