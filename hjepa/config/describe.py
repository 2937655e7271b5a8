"""The settings as text, read from the schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from hjepa.config.schema import Config
from hjepa.config.text import value_text
from hjepa.config.walk import Leaf, leaves
from hjepa.errors import ConfigError

PAGE_HEAD = """# Configuration

Every setting: what it takes, its default and its meaning. Written from the schema (`python -m hjepa.config.describe
> docs/configuration.md`); a test holds it current. `hjepa train --help-config [section]` prints the same.

A config is a YAML file with these keys as nested sections; `key=value` on the command line goes before the file. A key
that is not here is refused, and so are two settings that do not go together. A setting that has no say because another
one is off is named when the run starts. `-` stands for "not given".
"""


class Setting(NamedTuple):
    """One leaf of the schema, as text."""

    key: str
    takes: str
    default: str
    meaning: str


def settings(sections: Sequence[str] = ()) -> list[Setting]:
    """The settings of the sections named (all when none is), in the order of the schema.

    Raises:
        ConfigError: for a section that does not exist.
    """
    every = list(leaves())
    schemas = {section: section.model_json_schema()["properties"] for section in {leaf.section for leaf in every}}
    rows = [
        Setting(
            leaf.key,
            takes(schemas[leaf.section][leaf.key.rpartition(".")[2]]),
            _default(leaf),
            leaf.field.description or "",
        )
        for leaf in every
    ]
    for section in sections:
        if not any(_within(row.key, section) for row in rows):
            raise ConfigError(f"{section!r}: no such section; there are {', '.join(Config.model_fields)}")
    return [row for row in rows if not sections or any(_within(row.key, section) for section in sections)]


def settings_table(sections: Sequence[str] = ()) -> str:
    """Keys, what they take, defaults and meanings: for each setting a line and, below it, its meaning."""
    return "\n".join(f"{row.key}  ({row.takes}; {row.default})\n    {row.meaning}" for row in settings(sections))


def settings_page() -> str:
    """The page `docs/configuration.md`."""
    parts = [PAGE_HEAD.rstrip()]
    section = None
    for row in settings():
        if (here := row.key.partition(".")[0]) != section:
            section = here
            meaning = (Config.model_fields[here].annotation.__doc__ or "") if "." in row.key else ""
            parts.append(f"\n## {here}\n")
            parts += [f"{meaning.strip().splitlines()[0]}\n"] if meaning else []
            parts.append("| key | takes | default | meaning |\n| --- | --- | --- | --- |")
        cells = (f"`{row.key}`", row.takes, f"`{row.default}`", row.meaning)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def takes(schema: dict[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    if "takes" in schema:
        return str(schema["takes"])
    if "anyOf" in schema:
        return " or ".join("null" if part.get("type") == "null" else takes(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        inner = schema.get("prefixItems")
        return f"{len(inner)} of ({takes(inner[0])})" if inner else f"list of ({takes(schema['items'])})"
    if "pattern" in schema:
        return f"text that matches `{schema['pattern']}`"
    names = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text"}
    words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(schema[key])}" for key, sign in words.items() if key in schema]
    return " ".join([names[schema["type"]], *limits])


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith((f"{section}.", f"{section}[]"))


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _default(leaf: Leaf) -> str:
    if leaf.required:
        return "(required)"
    is_sections = isinstance(leaf.default, tuple) and any(isinstance(item, BaseModel) for item in leaf.default)
    return json.dumps(to_jsonable_python(leaf.default)) if is_sections else value_text(leaf.default)


if __name__ == "__main__":
    print(settings_page(), end="")
