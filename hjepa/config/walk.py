"""Walking through the schema and through configs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from hjepa.config.schema import Config


class Leaf(NamedTuple):
    """One setting.

    Attributes:
        key: its dotted name; a list of sections appears as `data.datasets[]`.
        section: the class that holds it.
        field: its type, default and meaning.
    """

    key: str
    section: type[BaseModel]
    field: FieldInfo

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.field.default is PydanticUndefined

    @property
    def default(self) -> Any:
        """Its value where it is not given; None for one that has to be given."""
        return None if self.required else self.field.default


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Leaf]:
    """Every setting, in the order of the schema."""
    for name, field in model.model_fields.items():
        inner, mark = section_of(field.annotation)
        if inner is None:
            yield Leaf(f"{prefix}{name}", model, field)
        else:
            yield from leaves(inner, f"{prefix}{name}{mark}.")


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, if any, and the mark `[]` when it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for argument in getattr(annotation, "__args__", ()):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument, "[]"
    return None, ""


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested plain data; entries of a list of sections as `data.datasets[0].name`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{key}[{index}]")
    else:
        yield key, value


def completed(config: dict[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """A resolved config of an earlier release, with today's defaults for settings that it does not know."""
    whole = dict(config)
    for name, field in model.model_fields.items():
        inner, mark = section_of(field.annotation)
        if inner is not None and not mark:
            whole[name] = completed(config.get(name, {}), inner)
        elif name not in whole and not field.is_required():
            whole[name] = to_jsonable_python(field.get_default(call_default_factory=True))
    return whole


def differences(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by name, in order, that differ between two resolved configs; each may be of an earlier release."""
    before, now = dict(flat(completed(earlier))), dict(flat(completed(later)))
    pairs = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def general(key: str) -> str:
    """`data.datasets[0].name` -> `data.datasets[].name`, the setting's name in the schema."""
    return re.sub(r"\[\d+\]", "[]", key)
