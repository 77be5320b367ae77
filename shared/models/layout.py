"""How a model for images and what runs through it lie in memory, and in which order it is run."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class Layout:
    """Runs a model for images with their channels last in memory, if the model can.

    Pooling, patches and convolutions are up to several times faster so. A model that views its
    tensors as if the channels came first fails, whatever the data, and is taken back.

    Args:
        model: whose weights are laid so, and whose ReLUs are put behind max pooling where that
            changes no number.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running = False
        self._channels_last = any(p.dim() == 4 for p in model.parameters())
        for module in model.modules():
            if type(module) is nn.Sequential and "forward" not in vars(module):
                module.forward = MethodType(_pooled_first, module)  # type: ignore[method-assign]
        if self._channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for module in model.modules():
                if not any(True for _ in module.children()):
                    module.register_forward_hook(self._keep_gradient)

    def outputs(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Returns what running the model on inputs gives."""
        if not self._channels_last:
            return run(inputs)
        lying = inputs
        if inputs.dim() == 4:  # and not views of images, which have an axis of their own
            lying = inputs.contiguous(memory_format=torch.channels_last)
        self._running = True
        try:
            return run(lying)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            self._channels_last = False
            self._model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        finally:
            self._running = False
        return run(inputs)

    def _keep_gradient(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Has the gradient of an output with channels last come in the same order.

        Behind a flattening it comes the other way, and going back through pooling or a ReLU by
        strides takes up to twenty times as long as the copy.
        """
        if not (self._running and isinstance(output, Tensor) and output.requires_grad):
            return
        lies_last = output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last)
        if lies_last and not output.is_contiguous():
            output.register_hook(_channels_last)  # type: ignore[no-untyped-call]  # torch's


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _pooled_first(layers: nn.Sequential, value: Any) -> Any:
    """Runs layers in their order, but a ReLU behind the max pooling that follows it.

    The greatest of what a ReLU leaves is what it leaves of the greatest, and its gradient goes to
    the same place, or nowhere: the same bits, from fewer numbers by the pooling's stride.
    """
    held: nn.Module | None = None
    for layer in layers:
        if held is not None and not _is_max_pool(layer):
            value, held = held(value), None
        if type(layer) is nn.ReLU and not _is_watched(layer):
            held = layer
        else:
            value = layer(value)
    return value if held is None else held(value)


def _is_max_pool(layer: nn.Module) -> bool:
    return type(layer) in _MAX_POOLS and not layer.return_indices and not _is_watched(layer)


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody has a hook on a layer, who would see other numbers; see `Layout`."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    others = [x for x in hooks if getattr(x, "__func__", None) is not Layout._keep_gradient]
    return bool(others or layer._backward_hooks or layer._backward_pre_hooks)
