"""How a model for images and what runs through it lie in memory, and in which order it is run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
T = TypeVar("T")


class Layout:
    """Runs a model for images with their channels last in memory, if the model can.

    Pooling, patches and convolutions are up to several times faster so. A model that views its
    tensors as if the channels came first fails, whatever the data, and is taken back.

    Args:
        model: whose weights are laid so, and whose ReLUs are run behind max pooling where that
            changes no number.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._channels_last = any(p.dim() == 4 for p in model.parameters())
        # Whose gradients may come otherwise; a pass finds out.
        self._unsure: set[nn.Module] = set()
        for module in model.modules():
            if type(module) is nn.Sequential and not _has_its_own_way(module):
                module.__class__ = _PooledFirst
        if self._channels_last:
            self._unsure = {module for module in model.modules() if _is_leaf(module)}
            self._lay(torch.channels_last)

    def run(self, passed: Callable[[Tensor], T], inputs: Tensor) -> T:
        """Returns what a pass over inputs gives, forward alone or backward too.

        It is made anew where it fails for how its numbers lie, and must have added nothing then.
        """
        if not self._channels_last:
            return passed(inputs)
        lying = inputs
        if inputs.dim() == 4:  # and not views of images, which have an axis of their own
            lying = inputs.contiguous(memory_format=torch.channels_last)
        looked = list(self._unsure) if torch.is_grad_enabled() else []
        hooks = [layer.register_forward_hook(self._look) for layer in looked]
        try:
            return passed(lying)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
        finally:
            for hook in hooks:
                hook.remove()
        self._channels_last = False
        self._lay(torch.contiguous_format)
        return passed(inputs)

    @torch.inference_mode(mode=False)
    def _lay(self, order: torch.memory_format) -> None:
        for value in [*self._model.parameters(), *self._model.buffers()]:
            if value.dim() == 4:  # for another number of axes torch knows no such order
                value.data = value.data.to(memory_format=order)

    def _look(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Looks how the gradient of an output comes, where the output has its channels last."""
        if not isinstance(output, Tensor) or output.is_leaf:
            return
        if output.dim() == 4 and _lies_last(output) and not output.is_contiguous():
            output.register_hook(partial(self._turned, layer))  # type: ignore[no-untyped-call]
        else:
            self._unsure.discard(layer)

    def _turned(self, layer: nn.Module, gradient: Tensor) -> Tensor:
        """Returns a gradient with its channels last.

        Behind a flattening it comes the other way, and to go back through pooling or a ReLU by
        strides takes up to twenty times as long as a copy. Elsewhere it comes well at every pass.
        """
        if _lies_last(gradient):
            self._unsure.discard(layer)
            return gradient
        return gradient.contiguous(memory_format=torch.channels_last)


class _PooledFirst(nn.Sequential):
    """Runs layers in their order, but a ReLU behind the max pooling that follows it.

    The greatest of what a ReLU leaves is what it leaves of the greatest, and its gradient goes to
    the same place, or nowhere: the same numbers, from fewer of them by the pooling's stride.
    """

    def forward(self, input: Any) -> Any:
        """Returns what the layers make of a value."""
        held: nn.Module | None = None
        layers = list(self)
        for layer, behind in zip(layers, [*layers[1:], None], strict=True):
            if held is not None:
                input, held = held(layer(input)), None
            elif type(layer) is nn.ReLU and type(behind) in _MAX_POOLS and _may_turn(layer, behind):
                held = layer
            else:
                input = layer(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Lets a copy, and what is written of a model, be of torch's own class."""
        return nn.Sequential, (), self.__getstate__()  # type: ignore[no-untyped-call]


def _may_turn(relu: nn.ReLU, pool: Any) -> bool:
    """Whether nobody can tell that a ReLU and a pooling change places.

    A ReLU in place writes over what others may read; a dilated window can lie in padding alone.
    """
    apart = pool.dilation if isinstance(pool.dilation, tuple) else (pool.dilation,)
    alone = not (relu.inplace or pool.return_indices or _is_watched(relu) or _is_watched(pool))
    return alone and max(apart) == 1


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody has a hook on a layer, who would see other numbers, or has changed it."""
    if not (layer._forward_hooks or layer._forward_pre_hooks):  # as at nearly every pass
        return bool(layer._backward_hooks or layer._backward_pre_hooks or _has_its_own_way(layer))
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    others = [hook for hook in hooks if getattr(hook, "__func__", None) is not Layout._look]
    theirs = layer._backward_hooks or layer._backward_pre_hooks or _has_its_own_way(layer)
    return bool(others or theirs)


def _has_its_own_way(module: nn.Module) -> bool:
    return "forward" in vars(module)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has no parts, and takes hooks."""
    return not isinstance(module, torch.jit.ScriptModule) and not any(
        True for _ in module.children()
    )


def _lies_last(value: Tensor) -> bool:
    return value.is_contiguous(memory_format=torch.channels_last)
