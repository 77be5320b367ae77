"""Which device trains."""

from __future__ import annotations

import torch

from bract.shared.errors import UsageError


def resolve(name: str) -> torch.device:
    """Returns the device for `auto`, `cpu`, `cuda:N` or `mps`.

    Raises:
        UsageError: where this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda:N or mps") from error
    absent = (
        device.type not in {"cpu", "cuda", "mps"}
        or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
        or (device.type == "mps" and not torch.backends.mps.is_available())
    )
    if absent:
        raise UsageError(f"this machine has no device {name!r}: use auto or cpu")
    return device
