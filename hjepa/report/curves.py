"""Which curves a run's record holds, in the order a reader asks for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hjepa.diagnosis import COLLAPSED_RANK, WEAK_STD
from hjepa.report.plot import Chart, Line
from hjepa.report.records import Record

# Figures of one line each: name in the record, title, what it means, scale from zero, may be logarithmic.
SINGLE = (
    ("rankme", "RankMe", "effective number of directions of embeddings", True, False),
    ("lr", "Learning rate", "as scheduled", True, False),
    ("momentum", "Momentum of the target", "share of itself that it keeps in a step", False, False),
    ("grad_norm", "Gradient norm", "before clipping", True, True),
    ("update", "Largest update", "of the last block, relative", True, True),
    ("drift", "Distance of the two encoders", "relative to the size of the weights", True, False),
    ("images_per_second", "Images per second", "between two lines of the record", True, False),
    ("memory_gb", "Peak memory", "GB (10^9 bytes)", True, False),
)
TITLES = {
    "loss": ("Loss", "all terms, weighted"),
    "loss/vicreg/invariance": ("VICReg: invariance", "distance of two views of one image"),
    "loss/vicreg/variance": ("VICReg: variance", "what the spread of the embedding lacks"),
    "loss/vicreg/covariance": ("VICReg: covariance", "what dimensions of the embedding share"),
    "loss/sigreg/invariance": ("SIGReg: invariance", "distance of the views of one image"),
    "loss/sigreg/sigreg": ("SIGReg: shape", "distance from a standard normal"),
}
PROBES = (("knn", "k-NN accuracy"), ("linear", "Linear probe accuracy"))


def charts_of(record: Record) -> list[Chart]:
    """The curves of one run."""
    names = record.names()
    charts = [_single(record, "loss", *TITLES["loss"], from_zero=False, may_be_log=True)] if "loss" in names else []
    levels = _levels(names, "loss/level")
    if levels:
        lines = [_level_line(record, f"loss/level{level}", level) for level in levels]
        charts.append(Chart("Loss by level", tuple(lines), "mean over its taps, not weighted", may_be_log=True))
        explained = [
            _level_line(record, f"explained/level{level}", level) for level in _levels(names, "explained/level")
        ]
        if explained:
            none = Line("mean target", _constant(explained[0], 0.0), reference=True)
            charts.append(
                Chart("Explained variance", (*explained, none), "of the targets, by predictions; 1 is perfect")
            )
    for level in levels:
        taps = [name for name in names if name.startswith(f"loss/level{level}/tap")]
        if len(taps) > 1:
            lines = [Line(f"block {name.rpartition('tap')[2]}", record.series(name), i) for i, name in enumerate(taps)]
            charts.append(
                Chart(f"Loss of level {level} by tap", tuple(lines), "by the block that is predicted", may_be_log=True)
            )
    for name in names:
        if name.startswith("loss/") and not name.startswith("loss/level"):
            title, note = TITLES.get(name, (name, ""))
            charts.append(_single(record, name, title, note, from_zero=False, may_be_log=True))
    spread = [_level_line(record, f"std/level{level}", level) for level in _levels(names, "std/level")]
    if "std/embedding" in names:
        spread.append(Line("embedding", record.series("std/embedding"), 4))
    if spread:
        weak = Line("warned below", _constant(spread[0], WEAK_STD), reference=True)
        charts.append(Chart("Spread over images (std)", (*spread, weak), "0 is collapse", from_zero=True))
    for name, title, note, from_zero, may_be_log in SINGLE:
        if name in names:
            charts.append(_single(record, name, title, note, from_zero, may_be_log))
    return charts


def probe_charts(record: Record) -> list[Chart]:
    """Accuracies over time beside what costs nothing; of a single evaluation there is no curve."""
    if len(record.evaluations) < 2:
        return []
    charts = []
    for probe, title in PROBES:
        lines = []
        for suffix, name, reference in (
            ("", "trained", False),
            ("_online", "online", False),
            ("_pixels", "raw pixels", True),
            ("_random", "untrained", True),
        ):
            points = [
                (s, values[probe + suffix]) for s, values in record.evaluations.items() if probe + suffix in values
            ]
            if points:
                lines.append(Line(name, points, int(suffix == "_online"), reference))
        if lines:
            charts.append(Chart(title, tuple(lines), "% of the test part", decimals=1))
    return charts


def charts_beside(records: Sequence[Record]) -> list[Chart]:
    """The curves of several runs on the same axes, a colour for each run."""
    charts = []
    for probe, title in PROBES:
        charts += _beside(
            records, title, [_probed(record, probe) for record in records], "% of the test part", decimals=1
        )
    names = list(dict.fromkeys(name for record in records for name in record.names()))
    for name, title, note, from_zero, may_be_log in _described(names):
        lines = [record.series(name) for record in records]
        charts += _beside(records, title, lines, note, from_zero, may_be_log)
    return charts


def _beside(
    records: Sequence[Record],
    title: str,
    series: Sequence[list[tuple[int, float | None]]],
    note: str = "",
    from_zero: bool = False,
    may_be_log: bool = False,
    decimals: int | None = None,
) -> list[Chart]:
    lines = [
        Line(record.name, points, i) for i, (record, points) in enumerate(zip(records, series, strict=True)) if points
    ]
    return [Chart(title, tuple(lines), note, from_zero, may_be_log, decimals)] if lines else []


def _described(names: Sequence[str]) -> Iterator[tuple[str, str, str, bool, bool]]:
    """Figures that are compared: losses, levels, and those of one line each; taps are left to a run's own page."""
    if "loss" in names:
        yield "loss", *TITLES["loss"], False, True
    for level in _levels(names, "loss/level"):
        yield f"loss/level{level}", f"Loss of level {level}", "mean over its taps, not weighted", False, True
    for level in _levels(names, "explained/level"):
        yield f"explained/level{level}", f"Explained variance of level {level}", "1 is perfect", False, False
    for name in names:
        if name in TITLES and name != "loss":
            yield name, *TITLES[name], False, True
    for level in _levels(names, "std/level"):
        yield f"std/level{level}", f"Spread over images, level {level}", "0 is collapse", True, False
    if "std/embedding" in names:
        yield "std/embedding", "Spread over images, embedding", "0 is collapse", True, False
    yield from (row for row in SINGLE if row[0] in names)


def _single(record: Record, name: str, title: str, note: str, from_zero: bool, may_be_log: bool) -> Chart:
    line = Line("rank" if name == "rankme" else "", record.series(name))
    lines = [line]
    if name == "rankme":
        lines.append(Line("collapse", _constant(line, COLLAPSED_RANK), reference=True))
    return Chart(title, tuple(lines), note, from_zero, may_be_log)


def _level_line(record: Record, name: str, level: int) -> Line:
    return Line(f"level {level}", record.series(name), level)


def _levels(names: Sequence[str], prefix: str) -> list[int]:
    """Levels of which there is such a figure."""
    found = (re.fullmatch(rf"{re.escape(prefix)}(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _constant(line: Line, value: float) -> list[tuple[int, float | None]]:
    """As long as a line."""
    return [(line.points[0][0], value), (line.points[-1][0], value)]


def _probed(record: Record, probe: str) -> list[tuple[int, float | None]]:
    return [(step, values[probe]) for step, values in record.evaluations.items() if probe in values]
