"""`hjepa report`: one page of HTML for a run, or for several beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hjepa.console import Console
from hjepa.errors import ConfigError, first_line
from hjepa.replacing import replacing
from hjepa.report.page import page_of_run, page_of_runs
from hjepa.report.pictures import draw
from hjepa.report.records import read_run

REPORT, COMPARISON = "report.html", "comparison.html"
MOST = 8  # runs on one page: more colours could not be told apart


def write_report(paths: Sequence[Path], output: Path | None = None, running: bool | None = None) -> Path:
    """Write the page of a run, or of several beside one another.

    Args:
        paths: folders of runs.
        output: the file; `report.html` in the run's folder or, of several, `comparison.html` here when not given.
        running: whether the run is being trained; None asks its folder.

    Returns:
        the file. It needs no network and no other file.

    Raises:
        ConfigError: where there is no run, or there are more than can be shown.
        StorageError: when the file cannot be written.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("hjepa report: the same run twice; name different ones")
    if len(paths) > MOST:
        raise ConfigError(f"hjepa report: {len(paths)} runs are more than the {MOST} that one page can show")
    records = [read_run(path, running) for path in paths]
    if len(records) == 1:
        page = page_of_run(records[0], draw(records[0]))
        file = output or paths[0] / REPORT
    else:
        page, file = page_of_runs(records), output or Path(COMPARISON)
    with replacing(file, advice="name another file with --output") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return file


def write_after_run(path: Path, console: Console) -> None:
    """Write a finished run's page; what fails or is interrupted there is a warning: the run is done and saved."""
    try:
        console.say(f"Report: {write_report([path], running=False)}")
    except (Exception, KeyboardInterrupt) as error:
        reason = first_line(error)
        console.warn(f"no report was written ({reason}); hjepa report {path} tries again")
