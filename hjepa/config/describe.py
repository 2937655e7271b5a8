"""The settings as text, read from the schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hjepa.config.load import section_of
from hjepa.config.schema import Config
from hjepa.errors import ConfigError


class Setting(NamedTuple):
    """One leaf of the schema."""

    key: str
    default: str
    meaning: str


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting, in the order of the schema."""
    for name, field in model.model_fields.items():
        inner, mark = section_of(field.annotation)
        if inner is not None:
            yield from settings(inner, f"{prefix}{name}{mark}.")
        else:
            yield Setting(f"{prefix}{name}", _text(field.default), field.description or "")


def settings_table(sections: Sequence[str] = ()) -> str:
    """Keys, defaults and meanings, one a line, of the sections named (all when none is).

    Raises:
        ConfigError: for a section that does not exist.
    """
    rows = list(settings())
    for section in sections:
        if not any(row.key == section or row.key.startswith((f"{section}.", f"{section}[]")) for row in rows):
            names = ", ".join(Config.model_fields)
            raise ConfigError(f"{section!r}: no such section; there are {names}")
    chosen = [
        row
        for row in rows
        if not sections or any(row.key == s or row.key.startswith((f"{s}.", f"{s}[]")) for s in sections)
    ]
    key_width = max(len(row.key) for row in chosen)
    default_width = max(len(row.default) for row in chosen)
    return "\n".join(f"{row.key:{key_width}}  {row.default:{default_width}}  {row.meaning}" for row in chosen)


def _text(default: Any) -> str:
    if default is PydanticUndefined:
        return "(required)"
    if default is None:
        return "-"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:.6g}"
    if isinstance(default, tuple):
        return "[" + ", ".join(_text(item) for item in default) + "]"
    return str(default)
