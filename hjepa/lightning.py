"""Lightning Fabric, imported without what it would pull in for nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A package that cannot be imported here, unless it has been already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


# Fabric asks for the version of torchmetrics by importing it, which brings scipy and matplotlib along and takes 1.6 s
# of every start. It is for a spike detector that we do not use.
with _hidden("torchmetrics"):
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

# Standard error is for what goes wrong; device and precision stand in the console's own lines.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

__all__ = ["DDPStrategy", "Fabric"]
