"""What code is running, as ledgers and summaries record it."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("bract", "dp-accounting", "flwr", "numpy", "opacus", "torch")


@lru_cache(maxsize=1)
def _installed() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return tuple(found.items())


def installed() -> dict[str, str]:
    """Returns the versions of bract, Python and what the private step stands on."""
    return dict(_installed())
