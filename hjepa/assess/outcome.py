"""What an evaluation found: for programs as JSON, for people as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hjepa.assess.subjects import TITLES, suffix, title
from hjepa.console import Console
from hjepa.evaluation.task import Figure
from hjepa.replacing import replacing

# A heading, and the column of each figure by name; a table is shown where one of its figures is there.
_TABLES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "",
        {
            "knn": "k-NN",
            "linear": "linear",
            "logistic": "logistic",
            "sgd": "SGD",
            "attentive": "attentive",
            "finetune": "fine-tuned",
        },
    ),
    ("k-NN by k, %", {}),  # filled with what was asked for
    ("Few-shot by images per class, %", {"shot1": "1", "shot5": "5", "shot10": "10"}),
    ("Without labels", {"nmi": "NMI", "rankme": "RankMe"}),
    (
        "Patches",
        {"patch_where": "object?", "patch_what": "which?", "miou": "mIoU", "patch_accuracy": "class"},
    ),
)


@dataclass
class Outcome:
    """All figures of an evaluation, by row and by name.

    Attributes:
        about: where the encoder comes from, what was looked at, how and with what.
        rows: figures by name, of every subject and feature, in the order of the tables.
        notes: what has to be said beside them.
    """

    about: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, subject: str, feature: str, name: str, figure: Figure) -> None:
        """Note one figure."""
        self.rows.setdefault((subject, feature), {})[name] = figure

    @property
    def values(self) -> dict[str, float]:
        """Figures by name as the run's own record calls them, such as `eval/knn_random`."""
        return {
            f"eval/{name}{suffix(*row)}": figure.value
            for row, figures in self.rows.items()
            for name, figure in figures.items()
        }

    def show(self, console: Console) -> None:
        """The run's own figures as lines, as it logged them, and all of them as tables."""
        for name, value in sorted(self.values.items()):
            if name.startswith(("eval/knn", "eval/linear", "eval/patch_")) and "@" not in name:
                console.say(f"{name} = {value:.2f}")
        for note in self.notes:
            console.say(f"Note: {note}")
        console.say(f"Step {self.about['step']}")
        for heading, columns, rows in self.tables():
            if heading:
                console.say("")
            console.table([heading, *columns], rows)
        console.say(f"Run: {self.about['run']}")

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Heading, columns, and rows of text."""
        names = list(dict.fromkeys(name for figures in self.rows.values() for name in figures))
        neighbours = {name: f"k={name[4:]}" for name in names if name.startswith("knn@")}
        for heading, known in _TABLES:
            wanted = {name: column for name, column in (known or neighbours).items() if name in names}
            shown = {row: figures for row, figures in self.rows.items() if wanted.keys() & figures.keys()}
            rows = []
            for (subject, feature), figures in shown.items():
                name = title(subject, feature)
                if feature != "last" and (subject, "last") in shown:
                    name = f"  {name.removeprefix(f'{TITLES[subject]}, ')}"  # below the one it belongs to
                rows.append([name, *(_cell(column, figures.get(column)) for column in wanted)])
            if rows:
                yield heading, list(wanted.values()), rows

    def as_json(self) -> dict[str, Any]:
        """Everything, with the figures of raw pixels and of other starts beside each that they are a baseline of."""
        figures = {}
        for (subject, feature), found in self.rows.items():
            for name, figure in found.items():
                entry: dict[str, Any] = {"value": _finite(figure.value)}
                if figure.spread is not None:
                    entry["std"] = _finite(figure.spread)
                if figure.chosen:
                    entry["chosen"] = dict(figure.chosen)
                if subject in ("", "online"):
                    entry["baselines"] = self._baselines(feature, name)
                figures[f"{name}{suffix(subject, feature)}"] = entry | {
                    "of": TITLES[subject],
                    "feature": feature,
                }
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return {**self.about, "date": date, "notes": self.notes, "figures": figures}

    def _baselines(self, feature: str, name: str) -> dict[str, float | None]:
        beside = {"pixels": ("pixels", "last"), "random": ("random", feature), "start": ("start", feature)}
        return {
            label: _finite(self.rows[row][name].value)
            for label, row in beside.items()
            if name in self.rows.get(row, {})
        }

    def write(self, path: Path) -> None:
        """One file, whole or not at all.

        Raises:
            StorageError: when the disk refuses.
        """
        with replacing(path, "--json") as temporary:
            temporary.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    unit = "" if name == "rankme" or name.startswith(("knn@", "shot")) else " %"
    spread = "" if figure.spread is None else f" +- {figure.spread:.1f}"
    return f"{figure.value:.1f}{spread}{unit}"
