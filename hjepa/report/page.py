"""Puts together the page: templates, style and script lie beside this file and end up in one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hjepa.report.curves import charts_beside, charts_of, probe_charts
from hjepa.report.pictures import Pictures
from hjepa.report.plot import Chart, lay_out
from hjepa.report.records import Record
from hjepa.report.summary import (
    figures_beside,
    is_earned,
    key_figures,
    next_commands,
    notes_of,
    probe_table,
    settings,
    state_of,
    verdict_of,
    worth_of,
)


def page_of_run(record: Record, pictures: Pictures) -> str:
    """The page of one run."""
    columns, rows = probe_table(record)
    return render(
        "run.html",
        title=record.config.experiment.name,
        record=record,
        state=state_of(record),
        verdict=verdict_of(record),
        earned=is_earned(record),
        figures=key_figures(record),
        probe_columns=columns,
        probe_rows=rows,
        probe_charts=_laid_out(probe_charts(record)),
        charts=_laid_out(charts_of(record)),
        pictures=pictures,
        settings=settings([record]),
        commands=next_commands(record),
        notes=notes_of(record),
    )


def page_of_runs(records: Sequence[Record]) -> str:
    """Several runs beside one another."""
    _tell_apart(records)
    return render(
        "runs.html",
        title=f"{len(records)} runs",
        records=records,
        states=[state_of(record) for record in records],
        worths=[worth_of(record) for record in records],
        figures=figures_beside(records),
        charts=_laid_out(charts_beside(records)),
        settings=[setting for setting in settings(records) if setting.differs],
    )


def _tell_apart(records: Sequence[Record]) -> None:
    """Names of runs with as much of their paths as makes them different."""
    parts = [record.path.resolve().parts for record in records]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    for record, name in zip(records, names, strict=True):
        record.name = name


def _laid_out(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    return [laid for chart in charts if (laid := lay_out(chart)) is not None]


def render(template: str, **values: Any) -> str:
    """A page from one of the templates; `by` names the command in its footer."""
    values.setdefault("by", "hjepa report")
    environment = Environment(
        loader=PackageLoader("hjepa.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"script": _script, "breakable": _breakable}
    return environment.get_template(template).render(written=f"{datetime.now():%Y-%m-%d %H:%M}", **values)


def _breakable(key: str) -> Markup:
    """A dotted name that may be broken where its parts meet."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(key))))


def _script(value: Any) -> Markup:
    """JSON that is safe inside a script element."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))
