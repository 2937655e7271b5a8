"""`hjepa compare A B`: two configs side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.config.text import value_text
from hjepa.config.walk import flat, general, leaves
from hjepa.errors import ConfigError
from hjepa.findings import Report, amount_of_memory, amount_of_time, millions
from hjepa.preflight import describe_model, describe_tokens

WIDTH = 100
VALUE_WIDTH = 18

# Figures in the order of the table: name in the report, name in the table, how it is written.
STATIC = (
    ("parameters_encoder", "parameters of the encoder", millions),
    ("parameters_predictor", "of the predictor", millions),
    ("parameters_projector", "of the projector", millions),
    ("parameters_trainable", "trainable", millions),
    ("parameters_total", "in all", millions),
    ("tokens_view", "patches of a view", "{:.0f}".format),
    ("tokens_context", "seen by the context encoder", "{:.1f}".format),
    *((f"tokens_level{level}", f"targets of level {level}", "{:.1f}".format) for level in range(4)),
)
MEASURED = (
    ("seconds_per_step", "time of a step", amount_of_time),
    ("seconds_per_epoch", "time of an epoch", amount_of_time),
    ("seconds_total", "time of the run", amount_of_time),
    ("peak_memory", "peak memory", amount_of_memory),
    ("largest_batch", "largest batch that fits", "{:.0f}".format),
    ("bytes_of_checkpoint", "a checkpoint", amount_of_memory),
)


@dataclass
class Comparison:
    """What was found.

    Attributes:
        names: of the two configs, as they were given.
        settings: (key, value of the first, of the second, meaning); what one of them lacks is "-".
        figures: (name, of the first, of the second, the second over the first).
        notes: what could not be measured, and why.
    """

    names: tuple[str, str]
    settings: list[tuple[str, str, str, str]] = field(default_factory=list)
    figures: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Plain text, at most 100 columns wide unless a word is longer."""
        parts = []
        if self.settings:
            parts.append(_columns([("setting", *self.names, "what it is"), *self.settings]))
        else:
            parts.append("No setting differs.")
        parts.append(_columns([("", *self.names, "second / first"), *self.figures]))
        return "\n\n".join([*parts, *self.notes])

    def markdown(self) -> str:
        """The same as Markdown."""
        parts = []
        if self.settings:
            rows = [(f"`{key}`", f"`{a}`", f"`{b}`", meaning) for key, a, b, meaning in self.settings]
            parts.append(_markdown([("setting", *self.names, "what it is"), *rows]))
        else:
            parts.append("No setting differs.")
        parts.append(_markdown([("", *self.names, "second / first"), *self.figures]))
        return "\n\n".join([*parts, *self.notes]) + "\n"


def compare(first: str, second: str, overrides: Sequence[str], everything: bool, measure: bool) -> Comparison:
    """Read two configs and set them side by side.

    Args:
        first, second: config files.
        overrides: `key=value`, for both.
        everything: show the settings that are equal, too.
        measure: run `hjepa check` on both, one after the other, in processes of their own, so that neither's memory
            counts for the other.

    Raises:
        ConfigError: when one of the configs is refused.
    """
    configs = [load_config(path, overrides) for path in (first, second)]
    comparison = Comparison((_short(first), _short(second)))
    values = [dict(flat(config.model_dump(mode="json"))) for config in configs]
    meanings = {leaf.key: leaf.field.description or "" for leaf in leaves()}
    for key in [*values[0], *(key for key in values[1] if key not in values[0])]:
        a, b = (value_text(side[key]) if key in side else "-" for side in values)
        if everything or a != b:
            comparison.settings.append((key, a, b, meanings[general(key)]))

    reports = []
    for config in configs:
        report = Report()
        describe_model(report, config, create_hjepa_from_config(config))
        describe_tokens(report, config)
        reports.append(report.figures)
    if measure:
        for path, figures in zip((first, second), reports, strict=True):
            found = _check(path, overrides)
            if isinstance(found, str):
                comparison.notes.append(f"{path} was not measured: {found}")
            else:
                figures |= found
    for name, title, write in (*STATIC, *(MEASURED if measure else ())):
        one, other = (report.get(name) for report in reports)
        if one is not None or other is not None:
            shown = ["-" if figure is None else write(figure) for figure in (one, other)]
            ratio = f"{other / one:.2f}" if one and other is not None else "-"
            comparison.figures.append((title, shown[0], shown[1], ratio))
    return comparison


def _check(path: str, overrides: Sequence[str]) -> dict[str, Any] | str:
    """The figures of `hjepa check`, or why there are none."""
    command = [sys.executable, "-m", "hjepa", "check", path, *overrides, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        raise ConfigError(
            done.stderr.strip().removeprefix("error: ") or f"{path}: hjepa check gave no answer"
        ) from None
    wrong = [item["text"] for item in report["items"] if item["verdict"] == "error"]
    figures: dict[str, Any] = report["figures"]
    return "; ".join(wrong) if wrong else figures


def _columns(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Four columns; what is too long for its own goes on below."""
    first = max(len(row[0]) for row in rows)
    middle = [min(VALUE_WIDTH, max(len(row[i]) for row in rows)) for i in (1, 2)]
    widths = [first, *middle, max(20, WIDTH - first - sum(middle) - 6)]
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            line = [cell[i] if i < len(cell) else "" for cell in cells]
            lines.append("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _markdown(rows: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- | --- | --- | --- |", *lines[1:]])


def _short(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".yaml").removesuffix(".yml")
