"""A file that holds the old content or the new one, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hjepa.errors import StorageError


@contextmanager
def replacing(path: Path, option: str = "", advice: str = "") -> Iterator[Path]:
    """A file to write, which then takes the place of `path`.

    Args:
        path: the file as the user named it.
        option: of the command line, with which it was named.
        advice: what to do where it cannot be written.

    Raises:
        StorageError: when the disk refuses; what was written so far is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        named, told = f"{option} {path}".strip(), f"; {advice}" if advice else ""
        raise StorageError(f"{named}: cannot be written ({error.strerror or error}){told}") from None
