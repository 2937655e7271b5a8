"""A run in words and tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from hjepa.build import run_path
from hjepa.config.text import value_text
from hjepa.config.walk import flat, general, leaves
from hjepa.findings import amount_of_time
from hjepa.report.plot import number
from hjepa.report.records import Record

PROBES = (("knn", "k-NN"), ("linear", "Linear"), ("patch_where", "Patch: where"), ("patch_what", "Patch: what"))
ENOUGH = 5  # lines of the record, of which the slowest sign of trouble needs as many
PERCENT = "\N{NO-BREAK SPACE}%"
_PROBE = re.compile(rf"({'|'.join(name for name, _ in PROBES)})(?:_(.+))?")


class Setting(NamedTuple):
    """One setting.

    Attributes:
        key: its dotted name.
        values: of each run, as text.
        default: as text.
        meaning: in words.
        differs: from the default, or between runs.
    """

    key: str
    values: tuple[str, ...]
    default: str
    meaning: str
    differs: bool


class Row(NamedTuple):
    """One line of a table of figures: its name, a text for each column, and what stands out."""

    name: str
    cells: tuple[str, ...]
    values: tuple[float | None, ...] = ()
    baseline: bool = False


def state_of(record: Record) -> str:
    """How far a run is."""
    step, planned = record.last_step, record.planned
    if record.running:
        return f"still running: step {step:,} of {planned:,}" if planned else f"still running: step {step:,}"
    if planned is None:
        return f"stopped at step {step:,}, before its first checkpoint"
    if step >= planned:
        return f"finished: {step:,} step{'s' if step > 1 else ''}"
    return f"stopped at step {step:,} of {planned:,}"


def verdict_of(record: Record) -> list[str]:
    """Whether it goes well, and what its encoder is worth: a sentence each."""
    if not record.steps:
        health = "No step has been recorded."
    elif record.findings:
        health = "Not healthy: " + "; ".join(record.findings) + "."
    elif len(record.steps) < ENOUGH:
        health = f"Too early to tell whether it is healthy: {len(record.steps)} line(s) of the record."
    else:
        health = "Healthy: no sign of collapse or divergence in the record."
    return [health, worth_of(record)]


def worth_of(record: Record) -> str:
    """The newest k-NN accuracy beside what costs nothing."""
    probed = record.probed
    knn = probed.get("knn")
    if knn is None:
        if not record.config.evaluation.eval_frequency:
            return "What the encoder is worth was not measured (evaluation.eval_frequency=0)."
        return "What the encoder is worth has not been measured: there is no evaluation in the record."
    parts = []
    for suffix, name in (("_pixels", "raw pixels"), ("_random", "the same encoder untrained")):
        other = probed.get(f"knn{suffix}")
        if other is not None:
            gap = knn - other
            parts.append(f"{abs(gap):.1f} points {'above' if gap >= 0 else 'below'} {name} ({other:.1f}{PERCENT})")
    beside = f", {' and '.join(parts)}" if parts else ""
    return f"k-NN accuracy {knn:.1f}{PERCENT} at step {max(record.evaluations):,}{beside}."


def is_earned(record: Record) -> bool:
    """Whether the encoder is not behind what costs nothing, as far as is known."""
    knn = record.probed.get("knn")
    others = (record.probed.get(f"knn{suffix}") for suffix in ("_pixels", "_random"))
    return knn is None or all(other is None or knn >= other for other in others)


def key_figures(record: Record) -> list[tuple[str, str]]:
    """The first figures one asks for: (value, what it is)."""
    found = []
    for name, title in PROBES[:2]:
        value = record.probed.get(name)
        if value is not None:
            found.append((f"{value:.1f}{PERCENT}", f"{title} accuracy"))
    found.append((f"{record.last_step:,}", "steps"))
    if record.seconds is not None:
        found.append((amount_of_time(record.seconds), "to the last save"))
    speed = _median(record, "images_per_second")
    if speed is not None:
        found.append((f"{speed:,.0f}", "images/s (median)"))
    return found


def probe_table(record: Record) -> tuple[list[str], list[Row]]:
    """Accuracies of the newest evaluation: titles of the columns, and a row for each feature."""
    table: dict[str, dict[str, float | None]] = {}
    for name, value in record.probed.items():
        match = _PROBE.fullmatch(name)
        if match:
            table.setdefault(match[2] or "", {})[match[1]] = value
    columns = [(probe, title) for probe, title in PROBES if any(probe in row for row in table.values())]
    rows = []
    for suffix in sorted(table, key=_place):
        values = tuple(table[suffix].get(probe) for probe, _ in columns)
        texts = tuple("" if value is None else f"{value:.1f}" for value in values)
        rows.append(Row(_feature(suffix), texts, values, suffix in ("pixels", "random", "start")))
    return [title for _, title in columns], rows


def _place(suffix: str) -> tuple[int, str]:
    order = ("", "online", "pixels", "random", "start")
    return (order.index(suffix) if suffix in order else len(order), suffix)


def _feature(suffix: str) -> str:
    named = {
        "": "trained encoder",
        "online": "without averaging (online)",
        "pixels": "raw pixels",
        "random": "untrained encoder",
        "start": "at the start (model.pretrained)",
    }
    if suffix in named:
        return named[suffix]
    if match := re.fullmatch(r"(tap|level)(\d+)", suffix):
        return f"block {match[2]}" if match[1] == "tap" else f"targets of level {match[2]}"
    return suffix


def figures_beside(records: Sequence[Record]) -> list[Row]:
    """The figures of several runs, a column for each."""
    rows = [
        Row("state", tuple(state_of(record).partition(":")[0].partition(" at")[0] for record in records)),
        Row("verdict", tuple(_short_verdict(record) for record in records)),
        Row("steps", tuple(f"{record.last_step:,}" for record in records)),
        Row("images seen", tuple(f"{record.last_step * record.config.data.images_per_step:,}" for record in records)),
        Row("time to the last save", tuple("-" if r.seconds is None else amount_of_time(r.seconds) for r in records)),
    ]
    for probe, title in PROBES:
        for suffix, name in (("", "%"), ("_pixels", "raw pixels, %"), ("_random", "untrained, %")):
            values = [record.probed.get(probe + suffix) for record in records]
            if any(value is not None for value in values):
                texts = tuple("-" if value is None else f"{value:.1f}" for value in values)
                rows.append(Row(f"{title}, {name}", texts, baseline=bool(suffix)))
    names = list(dict.fromkeys(name for record in records for name in record.names()))
    for name in names:
        if name == "loss" or name == "rankme" or name.startswith(("std/", "explained/")):
            rows.append(Row(f"last {name}", tuple(number(_last(record, name)) for record in records)))
    rows.append(Row("images/s (median)", tuple(number(_median(record, "images_per_second")) for record in records)))
    rows.append(Row("peak memory, GB", tuple(number(_largest(record, "memory_gb")) for record in records)))
    return rows


def settings(records: Sequence[Record]) -> list[Setting]:
    """Every setting of one run, or of several beside one another; those that differ are marked."""
    described = {leaf.key: leaf for leaf in leaves()}
    values = [dict(flat(record.config.model_dump(mode="json"))) for record in records]
    found = []
    for key in dict.fromkeys(key for side in values for key in side):
        leaf = described[general(key)]
        texts = tuple(value_text(side[key]) if key in side else "-" for side in values)
        default = value_text(_plain(leaf.default))
        differs = len(set(texts)) > 1 if len(records) > 1 else leaf.required or texts[0] != default
        found.append(Setting(key, texts, "" if leaf.required else default, leaf.field.description or "", differs))
    return found


def _plain(value: Any) -> Any:
    """A default as plain data, as a dumped config has it."""
    return list(value) if isinstance(value, tuple) else value


def next_commands(record: Record) -> list[tuple[str, str]]:
    """What to do now: (command, what it does)."""
    path = shlex.quote(str(record.path))
    found = []
    planned = record.planned
    if not record.running and (planned is None or record.last_step < planned):
        place = "" if run_path(record.config) == record.path else f" experiment.output_dir={path}"
        config = shlex.quote(str(record.path / "config.yaml"))
        found.append((f"hjepa train {config}{place} --resume", "go on to the end"))
    if record.saved is not None:
        found.append((f"hjepa eval {path}", "probe the newest checkpoint again"))
        found.append((f"hjepa embed {path} ./photos -o features.npy", "what the encoder says of your images"))
        found.append((f"hjepa export {path} --to timm -o encoder.safetensors", "carry the encoder elsewhere"))
    found.append((f"hjepa report {path} ANOTHER_RUN", "compare with another run"))
    if (record.path / "tensorboard").is_dir():
        found.append((f"tensorboard --logdir {shlex.quote(str(record.path / 'tensorboard'))}", "all curves, live"))
    return found


def notes_of(record: Record) -> list[str]:
    """What a reader should know of the record itself."""
    found = []
    if record.unreadable:
        found.append(f"{record.unreadable} line(s) of metrics.jsonl could not be read and are left out.")
    if record.bad_images:
        found.append(f"{record.bad_images} image file(s) could not be read; bad_images.jsonl lists them.")
    bad = _largest(record, "bad_steps")
    if bad:
        found.append(
            f"{bad:.0f} step(s) were skipped because something was not finite; bad_steps.jsonl lists their images."
        )
    back = _largest(record, "rollbacks")
    if back:
        found.append(f"The run went back to an earlier checkpoint {back:.0f} time(s); rollbacks.jsonl says why.")
    return found


def _short_verdict(record: Record) -> str:
    if not record.steps:
        return "-"
    return "; ".join(finding.partition(" since step ")[0] for finding in record.findings) or "healthy"


def _known(record: Record, name: str) -> list[float]:
    return [value for _, value in record.series(name) if value is not None]


def _last(record: Record, name: str) -> float | None:
    known = _known(record, name)
    return known[-1] if known else None


def _largest(record: Record, name: str) -> float | None:
    return max(_known(record, name), default=None)


def _median(record: Record, name: str) -> float | None:
    known = _known(record, name)
    return median(known) if known else None
