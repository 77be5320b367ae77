"""Activations by name; bounded ones suffer less from clipping (Papernot et al. 2021)."""

from __future__ import annotations

from torch import nn

from bract.shared.errors import UnknownName

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "selu": nn.SELU}


def activation_named(name: str) -> nn.Module:
    """Returns a new activation layer."""
    if name not in ACTIVATIONS:
        raise UnknownName("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()
