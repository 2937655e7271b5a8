"""`hjepa migrate`: a config of the first H-JEPA project in the vocabulary of today; nothing goes in silence."""

from __future__ import annotations

import difflib
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from hjepa.config.convert import KEYS, Became, convert, is_known, is_refused, place
from hjepa.config.legacy import DROPPED, READ, RENAMED
from hjepa.config.load import Key, Lines, explain, read_yaml
from hjepa.config.old import Old, plain
from hjepa.config.repair import repair
from hjepa.config.schema import Config
from hjepa.config.switches import idle_settings
from hjepa.config.text import config_text, printable
from hjepa.config.walk import flat, general
from hjepa.errors import ConfigError, StorageError

UNKNOWN = "of neither vocabulary, left out"

_WIDTH = 100


class Row(NamedTuple):
    """What became of one setting of the old file.

    Attributes:
        key: its dotted name there.
        value: its value there.
        became: the setting that holds its meaning now; empty if none does.
        note: why it was dropped, or what changed with it; may be empty.
    """

    key: str
    value: Any
    became: str
    note: str

    @property
    def outcome(self) -> str:
        """kept, renamed, dropped or unknown."""
        if self.became:
            return "kept" if self.became == self.key else "renamed"
        return "unknown" if self.note.startswith(UNKNOWN) else "dropped"


class Migration(NamedTuple):
    """A config in today's vocabulary and how it came about.

    Attributes:
        config: the checked settings.
        yaml: text of the new file, with the settings that the old one stated.
        rows: one for every setting of the old file, in its order.
    """

    config: Config
    yaml: str
    rows: list[Row]


def migrate(path: Path) -> Migration:
    """Write a config of the first H-JEPA project in today's vocabulary.

    What a key meant counts, whether or not the program ever read it; of several spellings of one setting, the one
    that it did read stands. Settings that do not go together are mended where there is one obvious way. A key of
    neither vocabulary is left out and reported rather than refused: one typo must not stand between a user and all
    their other settings. A file in today's vocabulary stays what it is.

    Raises:
        ConfigError: the file is not readable, describes a world model with actions, or holds a value that its setting
            does not take.
    """
    raw, lines, problems = read_yaml(path)
    if problems:
        raise ConfigError("\n".join(problems))
    stated: dict[str, Any] = {}
    for key, value in flat(raw):
        if key in stated:
            raise ConfigError(f"{path}: {key} is given twice, as sections and with a dot")
        stated[key] = value
    refused = [f"{key}{_line(key, lines)}" for key, value in stated.items() if is_refused(key, value)]
    if refused:
        raise ConfigError(f"{path}: {', '.join(refused)}: world models with actions are not what hjepa trains")
    old = Old(stated, is_old=any(general(key) not in KEYS and is_known(key) for key in stated))

    became = _convert_all(stated, old, path, lines)
    winners = _winners(became)
    settings: dict[str, Any] = {}
    for key in winners.values():
        settings |= became[key].settings
    # What a setting says itself stands before what came along with another one.
    settings |= {name: became[key].settings[name] for name, key in winners.items()}
    new_lines = {_parts(name): lines[_parts(key)] for name, key in winners.items() if _parts(key) in lines}
    settings = {name: _rounded(value) for name, value in settings.items()}
    config, notes = _check(settings, path, new_lines)
    notes += [tuple(line.split(" ", 1)) for line in idle_settings(config)]

    results = dict(flat(config.model_dump(mode="json")))
    rows = [_row(key, value, became, winners, old, results) for key, value in stated.items()]
    for name, note in notes:
        rows = _annotated(rows, name, note)
    comment = f"Migrated from {path.name} by hjepa migrate.\n{stated.get('experiment.description') or ''}"
    return Migration(config, config_text(config, set(settings), comment), rows)


def save(migration: Migration, path: Path) -> None:
    """Write the new file.

    Raises:
        StorageError: it exists already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(migration.yaml)
    except FileExistsError:
        raise StorageError(f"{path}: exists and is not overwritten; choose another name") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def show(migration: Migration) -> str:
    """The rows as plain text of at most 100 columns, and a line that counts them."""
    lines = []
    for row in migration.rows:
        target = f" -> {row.became}" if row.outcome == "renamed" else ""
        text = f"{printable(row.key)}: {_short(row.value)}{target}"
        indent = " " * 9
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=f"{row.outcome:9}", subsequent_indent=indent * 2, break_on_hyphens=False
        )
        lines += textwrap.wrap(
            row.note, _WIDTH, initial_indent=indent + "  ", subsequent_indent=indent + "  ", break_on_hyphens=False
        )
    outcomes = [row.outcome for row in migration.rows]
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in ("kept", "renamed", "dropped", "unknown"))
    return "\n".join([*lines, f"{len(outcomes)} settings: {counts}"])


def _convert_all(stated: dict[str, Any], old: Old, path: Path, lines: Lines) -> dict[str, Became]:
    became: dict[str, Became] = {}
    problems = []
    for key, value in stated.items():
        try:
            result = convert(key, value, old)
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{path}: {key}{_line(key, lines)}: {_short(value)} is not a value that it took")
            continue
        became[key] = result or Became({}, UNKNOWN + _suggestion(key))
    if problems:
        raise ConfigError("\n".join(problems))
    return became


def _winners(became: dict[str, Became]) -> dict[str, str]:
    """For every new setting that is the meaning of an old one, the old one that stands."""
    winners: dict[str, str] = {}
    for key, result in became.items():
        for name in list(result.settings)[:1]:
            if name not in winners or place(key) < place(winners[name]):
                winners[name] = key
    return winners


def _check(settings: dict[str, Any], path: Path, lines: Lines) -> tuple[Config, list[tuple[str, ...]]]:
    """The config, and for each mended setting its name and what was wrong; `settings` takes the new values."""
    notes: list[tuple[str, ...]] = []
    while True:
        try:
            return Config.model_validate(_nested(settings)), notes
        except ValidationError as error:
            # A section says what does not go together only once each of its values is right by itself.
            found = [
                tuple(".".join((*map(str, item["loc"]), key)) for key in conflict.keys)
                for item in error.errors()
                if item["type"] == "conflict"
                for conflict in item["ctx"]["conflicts"]
            ]
            mended = [(keys, mend) for keys in found if (mend := repair(keys, settings))]
            if not mended or len(notes) > len(KEYS):
                raise ConfigError("\n".join(explain(_nested(settings), error, str(path), lines, ()))) from None
            for keys, mend in mended:
                stated = [key for key in (*keys, *mend.settings) if key in settings]
                notes.append((stated[0] if stated else keys[0], mend.note))
                settings |= mend.settings


def _row(
    key: str, value: Any, became: dict[str, Became], winners: dict[str, str], old: Old, results: dict[str, Any]
) -> Row:
    notes = ["did nothing there"] if old.is_old and is_known(key) and plain(key) not in READ else []
    name = next(iter(became[key].settings), "")
    winner = winners.get(name, key)
    if winner != key:
        said = became[winner].settings[name]
        if _same(said, became[key].settings[name]):
            notes.append(f"{winner} says the same")
        else:
            read = "was read there and " if plain(winner) in READ else ""
            notes.append(f"{winner}: {_short(said)} {read}stands")
            name = ""
    else:
        if name in results and not _same(value, results[name]):
            notes.append(f"now {_short(results[name])}")
        notes.append(became[key].note)
    return Row(key, value, name, "; ".join(filter(None, notes)))


def _annotated(rows: list[Row], name: str, note: str) -> list[Row]:
    if not any(row.became == name for row in rows):
        return [*rows, Row(name, None, name, note)]
    return [row._replace(note="; ".join(filter(None, (row.note, note)))) if row.became == name else row for row in rows]


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(plain(key), [plain(name) for name in (*KEYS, *RENAMED, *DROPPED)], 1, 0.8)
    return f"; did you mean {close[0]}?" if close else ""


def _line(key: str, lines: Lines) -> str:
    return f" (line {lines[_parts(key)]})" if _parts(key) in lines else ""


def _parts(key: str) -> Key:
    """`data.datasets[0].name` -> ("data", "datasets", 0, "name")."""
    found = re.findall(r"\[(\d+)\]|([^.\[]+)", key)
    return tuple(int(index) if index else name for index, name in found)


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name as the sections that a file holds."""
    root: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = _parts(key)
        here: Any = root
        for part in sections:
            here = here.setdefault(part, {}) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here[last] = value
    return {name: _with_lists(section) for name, section in root.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_with_lists(value[key]) for key in sorted(value)]
    return {key: _with_lists(inner) for key, inner in value.items()}


def _same(a: Any, b: Any) -> bool:
    """Whether two spellings are one value: 1e-5 is a text to YAML 1.1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(*pair) for pair in zip(a, b, strict=True))
    try:
        return bool(_rounded(float(a)) == _rounded(float(b)))
    except (TypeError, ValueError, OverflowError):
        return a is b or repr(a) == repr(b)


def _rounded(value: Any) -> Any:
    """Without the last digits of floats, so that 0.6000000000000001 is 0.6."""
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    text = f"{value:.12g}" if isinstance(value, float) else printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
