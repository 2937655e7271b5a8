"""Modules that bear the name of what they are for.

`hjepa.train(config)` is how a user of the package says it, and `hjepa.train` is a module, which Python puts in the
package's place of that name whenever somebody imports it. So the module itself can be called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Let the module of this name be called as if it were the function."""

    class CallableModule(ModuleType):
        __doc__ = function.__doc__

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    # What the language reference offers for this: "Customizing module attribute access".
    sys.modules[name].__class__ = CallableModule
