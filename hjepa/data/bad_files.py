"""Files of a source that cannot be read: which they are, and how many there may be."""

from __future__ import annotations

from collections.abc import Mapping

from hjepa.errors import DataError

_SHOWN = 3


class BadFiles:
    """What this process knows of the unreadable files of one source.

    Args:
        source: its name, for messages.
        files: how many it has.
        allowed: share of them that may be unreadable.

    Attributes:
        found: reason by path.
    """

    def __init__(self, source: str, files: int, allowed: float) -> None:
        self.source = source
        self.files = files
        self.allowed = allowed
        self.found: dict[str, str] = {}

    def add(self, found: Mapping[str, str]) -> None:
        """Take files in, known ones too.

        Raises:
            DataError: when there are more than allowed; they are all in `found` then.
        """
        self.found.update(found)
        if found and len(self.found) / self.files > self.allowed:
            raise DataError(
                f"{self.source}: {len(self.found)} of {self.files} files cannot be read, more than "
                f"data.max_bad_fraction={self.allowed:g}: {listed(self.found)}; mend or remove them, or raise "
                "data.max_bad_fraction"
            )


def listed(found: Mapping[str, str]) -> str:
    """The first few, each with its reason, in one line."""
    first = [f"{path} ({reason})" for path, reason in list(found.items())[:_SHOWN]]
    return "; ".join(first) + ("; ..." if len(found) > _SHOWN else "")
