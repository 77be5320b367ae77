"""How a model for images and what runs through it lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Layout:
    """Runs a model for images with their channels last in memory, if the model can.

    Pooling, patches and convolutions are up to several times faster so. A model that views its
    tensors as if the channels came first fails, whatever the data, and is taken back.

    Args:
        model: whose weights are laid so.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._channels_last = any(p.dim() == 4 for p in model.parameters())
        if self._channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def outputs(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Returns what running the model on inputs gives."""
        if not self._channels_last:
            return run(inputs)
        lying = inputs
        if inputs.dim() == 4:  # and not views of images, which have an axis of their own
            lying = inputs.contiguous(memory_format=torch.channels_last)
        try:
            return run(lying)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            self._channels_last = False
            self._model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            return run(inputs)
