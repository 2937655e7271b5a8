"""Reading a config: YAML, overrides, and errors that name file, line, key and remedy."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hjepa.config.data import folder_section
from hjepa.config.legacy import RENAMED
from hjepa.config.schema import Config
from hjepa.config.types import Conflict
from hjepa.config.walk import leaves
from hjepa.errors import ConfigError

MAX_BYTES = 1_000_000

Key = tuple[str | int, ...]
Lines = dict[Key, int]


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without anchors: an alias can grow a kilobyte into gigabytes, and no config needs one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not accepted", event.start_mark)
        return super().compose_node(parent, index)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check everything.

    Args:
        path: the file; None starts from the defaults.
        overrides: such as `training.epochs=3`; values are YAML. `data=./photos` puts a folder in the place of the
            file's `data.datasets` and leaves the rest of its section.

    Raises:
        ConfigError: with one line for every mistake found.
    """
    raw: dict[str, Any] = {}
    lines: Lines = {}
    problems: list[str] = []
    where = "command line"
    if path is not None:
        where = str(path)
        raw, lines, problems = read_yaml(Path(path))
    return _resolve(raw, where, overrides, lines, problems)


def as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """A config from what stands for one: itself, the sections as plain data, or the path of a file.

    Raises:
        ConfigError: with one line for every mistake found.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return resolve(config)
    return load_config(config)


def resolve(sections: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> Config:
    """What `load_config` makes of a file, made of its sections as plain data.

    Args:
        sections: such as `{"training": {"epochs": 3}}`; left as they are.
        overrides: see `load_config`.
        where: what messages call them.

    Raises:
        ConfigError: with one line for every mistake found.
    """
    wrong = [key for key in sections if not isinstance(key, str)]
    if wrong:
        raise ConfigError(f"{where}: {wrong[0]!r}: a key must be a plain word")
    return _resolve(copy.deepcopy(dict(sections)), where, overrides, {}, [])


def _resolve(raw: dict[str, Any], where: str, overrides: Sequence[str], lines: Lines, problems: list[str]) -> Config:
    for text in overrides:
        _apply(raw, lines, text)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += explain(raw, error, where, lines, overrides)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines, list[str]]:
    """Content, the line of every key, and what YAML itself would accept in silence."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes is no config; the limit is {MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; shipped recipes are in configs/") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        loader = _PlainLoader(text)
        try:
            node = loader.get_single_node()
            lines: Lines = {}
            problems = list(_walk(node, (), lines)) if node is not None else []
            raw = loader.construct_document(node) if node is not None else {}
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}, line {line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'data:', got a {type(raw).__name__}")
    return _plain(raw), lines, [f"{path}, {problem}" for problem in problems]


def _plain(value: Any) -> Any:
    """Without the keys that are no words; they are among the problems already."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if isinstance(key, str)}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _walk(node: yaml.Node, key: Key, lines: Lines) -> Iterator[str]:
    """Note the line of every key; yield what YAML would accept in silence."""
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag != "tag:yaml.org,2002:str":
                yield f"line {line}: a key must be a plain word"
                continue
            if name.value in seen:
                yield f"line {line}: {_dotted((*key, name.value))} is given twice (first in line {seen[name.value]})"
            seen[name.value] = line
            lines[(*key, name.value)] = line
            yield from _walk(value, (*key, name.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _walk(value, (*key, index), lines)


def _apply(raw: dict[str, Any], lines: Lines, text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name or not all(name.split(".")):
        raise ConfigError(f"{text!r}: an override has the form key=value, such as training.epochs=3")
    try:
        parsed = yaml.load(value, _PlainLoader)  # safe: derived from SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"{text!r}: the value is not readable as YAML") from None
    if name == "data" and isinstance(parsed, str) and isinstance(raw.get("data"), dict):
        # Other images, shown as the file says.
        name, parsed = "data.datasets", folder_section(parsed)["datasets"]
    here: Any = raw
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in name.split(".")]
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise ConfigError(f"{text!r}: {_dotted(tuple(parts[:depth]))} has entries 0 to {len(here) - 1}")
        elif not isinstance(here, dict):
            raise ConfigError(f"{text!r}: {_dotted(tuple(parts[:depth]))} is a value, not a section")
        if last:
            here[part] = parsed
        else:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            if depth == 0 and part == "data" and isinstance(here[part], str):
                here[part] = folder_section(here[part])
            here = here[part]
    # The file's line no longer says where the value comes from.
    for key in [key for key in lines if key[: len(parts)] == tuple(parts)]:
        del lines[key]


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def explain(
    raw: dict[str, Any], error: ValidationError, where: str, lines: Lines, overrides: Sequence[str]
) -> Iterator[str]:
    """One line for every mistake."""
    items = error.errors(include_url=False)
    # A list whose entries are all wrong is not also too short.
    items = [
        i
        for i in items
        if i["type"] != "too_short" or not any(i["loc"] == o["loc"][:-1][: len(i["loc"])] for o in items)
    ]
    for item in items:
        if item["type"] == "conflict":
            for keys, message in _conflicts(item):
                yield f"{_place(keys[0], where, lines, overrides)}{message}"
            continue
        key = _key(item)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key" + _suggest(key)
        elif item["type"] not in ("value_error", "missing"):
            message = f"{message[0].lower()}{message[1:]}, got {_shown(item['input'])}"
        yield f"{_place(key, where, lines, overrides)}{message}"

    # What pydantic leaves unchecked once a value is wrong: conflicts between the other values.
    told = {keys for item in items if item["type"] == "conflict" for keys, _ in _conflicts(item)}
    wrong = [_key(item) for item in items if item["type"] != "conflict"] + [key for keys in told for key in keys]
    pruned = copy.deepcopy(raw)
    while wrong:
        for key in wrong:
            _remove(pruned, key)
        try:
            Config.model_validate(pruned)
            return
        except ValidationError as again:
            items = again.errors()
        behind = [pair for item in items if item["type"] == "conflict" for pair in _conflicts(item)]
        new = [(keys, message) for keys, message in behind if keys not in told]
        for keys, message in new:
            if not any(_touch(key, other) for key in keys for other in wrong):
                yield f"{_place(keys[0], where, lines, overrides)}{message}"
        told |= {keys for keys, _ in new}
        # An entry of a list that lost its name goes with its list.
        more = [key for keys, _ in new for key in keys] + [
            _key(item)[:-2] for item in items if item["type"] == "missing"
        ]
        more = [key for key in more if key and key not in wrong]
        wrong = [*wrong, *more] if more else []


def _key(item: ErrorDetails) -> Key:
    """Where an error is; pydantic's marks for the members of a union are no part of it."""
    return tuple(part for part in item["loc"] if not (isinstance(part, str) and "[" in part))


def _conflicts(item: ErrorDetails) -> Iterator[tuple[tuple[Key, ...], str]]:
    conflicts: list[Conflict] = item["ctx"]["conflicts"]
    for conflict in conflicts:
        yield tuple((*_key(item), *key.split(".")) for key in conflict.keys), conflict.message


def _touch(a: Key, b: Key) -> bool:
    """Whether one of two settings is (a part of) the other."""
    return a[: len(b)] == b[: len(a)]


def _remove(raw: dict[str, Any], key: Key) -> None:
    """Take a setting out; of a list of plain values the whole list."""
    here: Any = raw
    for depth, part in enumerate(key):
        inner = here[part] if isinstance(here, dict) and part in here else None
        if depth == len(key) - 1 or not isinstance(inner, dict):
            is_sections = isinstance(inner, list) and depth + 2 < len(key) and isinstance(inner[0], dict)
            if is_sections and isinstance(key[depth + 1], int):
                _remove(inner[key[depth + 1]], key[depth + 2 :])  # type: ignore[index]
            elif isinstance(here, dict):
                here.pop(part, None)
            return
        here = inner


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(key: Key, where: str, lines: Lines, overrides: Sequence[str]) -> str:
    name = _dotted(key)
    number = lines.get(key)
    if number is not None and key:
        return f"{where}: {name} (line {number}): "
    given = [re.sub(r"\.(\d+)", r"[\1]", text.partition("=")[0]) for text in overrides]
    if name and any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in given):
        return f"command line: {name}: "
    return f"{where}: {name}: " if name else f"{where}: "


def _suggest(key: Key) -> str:
    wanted = _dotted(tuple(part for part in key if isinstance(part, str)))
    known = [leaf.key.replace("[]", "") for leaf in leaves()]
    if wanted in RENAMED:
        return f"; did you mean {RENAMED[wanted]}?"
    sections = sorted({name.rpartition(".")[0] for name in known} - {""})
    close = difflib.get_close_matches(wanted, known + sections, n=1, cutoff=0.75)
    if not close:
        # The right word in the wrong section, or a longer spelling of it.
        leaf = wanted.rpartition(".")[2]
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.75)]
    return f"; did you mean {close[0]}?" if close else "; hjepa train --help-config lists the keys"
