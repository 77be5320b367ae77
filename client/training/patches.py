"""What the places of a convolution see: its patches, laid so that copying them is cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional


def lie_channels_last(
    layer: nn.Conv1d | nn.Conv2d, inputs: Sequence[Tensor], backprops: Tensor
) -> bool:
    """Whether patches are copied in longer runs, or at all, where channels are the last axis."""
    if layer.groups > 1:
        return False
    # numbers that lie side by side: of a patch, or of a row of places, whose strides leave gaps
    run: int = layer.kernel_size[-1] * layer.in_channels * layer.stride[-1]
    return (inputs[0].stride(1) == 1 and layer.in_channels > 1) or run > backprops.shape[-1]


def patches_of(
    layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, last: bool
) -> Callable[[slice], Tensor]:
    """Returns what gives, of some examples, what each output place of a convolution sees.

    As (examples · groups, places, features). Features are a channel of the group, then a place in
    the kernel; the other way where `last`. Nothing is copied before it is asked for.
    """
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    if last:
        inputs = inputs.movedim(1, -1).contiguous().movedim(-1, 1)
    sizes, axes = inputs.shape[2:], range(len(layer.kernel_size))
    outputs = [
        (sizes[i] - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1) // layer.stride[i] + 1
        for i in axes
    ]
    example, channel, *steps = inputs.stride()
    view = inputs.as_strided(
        (*inputs.shape[:2], *layer.kernel_size, *outputs),
        (
            example,
            channel,
            *(steps[i] * layer.dilation[i] for i in axes),
            *(steps[i] * layer.stride[i] for i in axes),
        ),
        inputs.storage_offset(),
    )
    places, features = math.prod(outputs), math.prod(layer.weight.shape[1:])
    if last:  # (examples, places…, kernel…, channel)
        order = (0, *(i + 2 + len(axes) for i in axes), *(i + 2 for i in axes), 1)
        lying = view.permute(order)
        return lambda part: lying[part].reshape(-1, places, features)
    return lambda part: view[part].reshape(-1, features, places).transpose(1, 2)
