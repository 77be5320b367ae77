"""Which device trains."""

from __future__ import annotations

import torch

from bract.shared.errors import UsageError


def resolve(name: str) -> torch.device:
    """Returns the device for `auto`, `cpu` or `cuda:N`; mps lacks the float64 that norms need.

    Raises:
        UsageError: where this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: use auto, cpu or cuda:N") from error
    absent = device.type not in {"cpu", "cuda"} or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    )
    if absent:
        raise UsageError(f"this machine has no device {name!r}: use auto or cpu")
    return device
