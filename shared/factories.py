"""Functions of installed code by name, `module:function`, as users bring their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from bract.shared.errors import UsageError


def named(name: str, what: str) -> Callable[..., Any]:
    """Returns the function `module:function`.

    Args:
        name: of the function.
        what: it makes, as an error says it.

    Raises:
        UsageError: where it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{what} {name!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise UsageError(f"{what} {name!r} is not a function")
    return factory  # type: ignore[no-any-return]
