"""Leaf types that refuse what YAML and Python would quietly convert, and the section that holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Conflict(NamedTuple):
    """Settings that are each fine and do not go together.

    Attributes:
        keys: their names, relative to the section that says so; the error is shown at the first.
        message: what is wrong, and a value that would be accepted.
    """

    keys: tuple[str, ...]
    message: str


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the settings of this section, all of it."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        found = list(self.conflicts())
        if found:
            text = "\n".join(f"{conflict.keys[0]}: {conflict.message}" for conflict in found)
            raise PydanticCustomError("conflict", "{text}", {"text": text, "conflicts": found})
        return self


def _as_float(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 (no dot) as a string; a user means the number.
    if isinstance(value, bool):
        raise ValueError("expected a number, got a boolean")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"expected a number, got the text {value!r}") from None
    if isinstance(value, int):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError("expected a finite number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected [low, high] with low <= high; write [{pair[1]}, {pair[0]}]")
    return pair


_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as 8h, 90m, 1h30m or 45s; 0 for what is none."""
    found = _DURATION.fullmatch(duration.replace(" ", ""))
    parts = found.groups() if found else ()
    return sum(float(part) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=False) if part)


def _as_duration(value: Any) -> Any:
    if not isinstance(value, str) or not seconds_of(value):
        raise ValueError(f"expected a duration with its unit, such as 8h, 90m or 1h30m, got {value!r}")
    return value


def _as_batch_size(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"expected a number of images (an integer of at least 1) or auto, got {value!r}")
    return value


def _as_switch(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"expected true, false or auto, got {value!r}")
    return value


def _as_blocks(value: Any) -> Any:
    if value not in ("encoder", "predictor") and not isinstance(value, bool):
        raise ValueError(f"expected true, false, encoder or predictor, got {value!r}")
    return value


def _as_weights(value: Any) -> Any:
    if not isinstance(value, bool) and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"expected true, false, or the path of a file or of a run, got {value!r}")
    return value


def _share(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1] <= 1:
        raise ValueError("expected [low, high] within (0, 1]")
    return pair


def _ratio(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] <= 0:
        raise ValueError("expected [low, high] with low above 0")
    return pair


def _says(what: str) -> WithJsonSchema:
    """How the documentation calls a type that JSON schema has no words for."""
    return WithJsonSchema({"takes": what})


AsFloat = BeforeValidator(_as_float)

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
Float = Annotated[float, AsFloat]
# Limits stand before AsFloat, so that they belong to the number and show in the documentation.
Unit = Annotated[float, Field(ge=0, le=1), AsFloat]
Rate = Annotated[float, Field(ge=0, lt=1), AsFloat]
Weight = Annotated[float, Field(ge=0), AsFloat]
Scale = Annotated[float, Field(gt=0), AsFloat]
Positive = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]
# Upper limits are far above what anybody runs; they catch a slip of the finger before memory does.
Depth = Annotated[Int, Field(ge=1, le=256)]
Width = Annotated[Int, Field(ge=1, le=1 << 16)]
Few = Annotated[Int, Field(ge=0, le=512)]
Pixels = Annotated[Int, Field(ge=1, le=1 << 13)]

_Pair = Annotated[tuple[Float, Float], AfterValidator(_ordered)]
Share = Annotated[_Pair, AfterValidator(_share), _says("[low, high] within (0, 1]")]
Ratio = Annotated[_Pair, AfterValidator(_ratio), _says("[low, high] above 0")]
Duration = Annotated[str, BeforeValidator(_as_duration), _says("duration such as 8h, 90m or 1h30m")]
Switch = Annotated[bool | Literal["auto"], BeforeValidator(_as_switch), _says("true, false or auto")]
Blocks = Annotated[
    bool | Literal["encoder", "predictor"],
    BeforeValidator(_as_blocks),
    _says("true, false, encoder or predictor"),
]
Released = Annotated[bool | str, BeforeValidator(_as_weights), _says("true, false, or a path")]
BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_as_batch_size), _says("integer >= 1, or auto")]
