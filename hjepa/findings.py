"""What was found of a config, as a table for people and as figures for programs."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from typing import Any

from hjepa.errors import UserError

WIDTH = 100


@dataclass(frozen=True)
class Item:
    """One line of the table.

    Attributes:
        name: what was looked at.
        verdict: "ok", "warning" or "error".
        text: what was found.
    """

    name: str
    verdict: str
    text: str


@dataclass
class Report:
    """What was found.

    Attributes:
        items: in the order of the table.
        figures: the numbers in it by name; times in seconds, sizes in bytes.
        exit_code: 0, or that of the first error.
    """

    items: list[Item] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    def add(self, name: str, text: str, verdict: str = "ok") -> None:
        """One more line."""
        self.items.append(Item(name, verdict, text))

    def fail(self, name: str, error: UserError) -> None:
        """A line for what would end the run."""
        for line in str(error).splitlines():
            self.add(name, line, "error")
        self.exit_code = self.exit_code or error.exit_code

    def table(self) -> str:
        """Plain text, at most 100 columns wide unless a word is longer."""
        names = max(len(item.name) for item in self.items)
        verdicts = max(len(item.verdict) for item in self.items)
        lines = []
        for item in self.items:
            head = f"{item.name:{names}}  {item.verdict:{verdicts}}  "
            lines += textwrap.wrap(
                item.text,
                WIDTH,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
        return "\n".join(lines)

    def json(self) -> str:
        """The same for programs."""
        return json.dumps({"items": [vars(item) for item in self.items], "figures": self.figures}, indent=1)


def millions(number: int) -> str:
    """In millions: 1.32M."""
    return f"{number / 1e6:.2f}M"


def amount_of_memory(number: float) -> str:
    """In the unit that fits, powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.0f} kB"


def amount_of_time(seconds: float) -> str:
    """Hours, minutes and seconds, as many as matter."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
