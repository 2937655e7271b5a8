"""Leaf types that refuse what YAML and Python would quietly convert."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected [low, high] with low <= high; write [{pair[1]}, {pair[0]}]")
    return pair


Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
Float = Annotated[float, BeforeValidator(_as_float)]
Interval = Annotated[tuple[Float, Float], AfterValidator(_ordered)]
