"""Some settings of a config as the text of a file, for people to read and go on with."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from hjepa.config.schema import Config

_WIDTH = 100


def config_text(config: Config, stated: set[str], comment: str) -> str:
    """YAML that `load_config` reads back, sections in the order of the schema.

    Args:
        config: the settings.
        stated: dotted names of those to write; the others are left to their defaults.
        comment: what stands above them.
    """
    lines = [line for text in comment.splitlines() for line in textwrap.wrap(printable(text), _WIDTH)]
    text = "".join(f"# {line}\n" for line in lines)
    for name, section in config.model_dump(mode="json").items():
        part = _part(section, name, stated)
        if part is not None:
            block = dict(part) if isinstance(part, dict) else part
            text += yaml.dump({name: block}, Dumper=_Dumper, sort_keys=False, width=110)
    return text


def value_text(value: Any) -> str:
    """A setting's value in a table; `-` for what is not given."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return str(value)


def printable(text: str) -> str:
    """With spaces for what neither a terminal nor YAML takes as it is."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class _Dumper(yaml.SafeDumper):
    """Short sections of sections and lists of values on one line, numbers as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


class _Inline(dict[str, Any]):
    pass


def _float_text(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    # YAML 1.1 takes a number with an exponent for one only if it has a dot.
    mantissa, e, exponent = repr(value).partition("e")
    text = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}" if e else mantissa
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _list_text(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, not any(isinstance(part, dict) for part in value))


_Dumper.add_representer(float, _float_text)
_Dumper.add_representer(list, _list_text)
_Dumper.add_representer(_Inline, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value, True))


def _part(value: Any, key: str, stated: set[str]) -> Any:
    """What is stated of a value; None for nothing of it."""
    if isinstance(value, dict):
        parts = {name: _part(inner, f"{key}.{name}", stated) for name, inner in value.items()}
        kept = {name: part for name, part in parts.items() if part is not None or f"{key}.{name}" in stated}
        if not kept:
            return None
        return _Inline(kept) if len(str(kept)) < _WIDTH - 20 else kept
    if isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [_part(inner, f"{key}[{index}]", stated) for index, inner in enumerate(value)]
        return entries if any(entries) else None
    return value if key in stated else None
