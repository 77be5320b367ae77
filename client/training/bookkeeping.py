"""Clipped sums from one forward and one backward pass that forms no gradient of a parameter.

Book-keeping, Bu, Wang, Zha & Karypis 2023 (arXiv 2210.00038): the backward pass stops at the
outputs of the layers; their gradients and the layers' inputs give norms, then weighted sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bract.client.training import layers
from bract.client.training.clipping import clip_factors, joint_norms
from bract.client.training.layers import Rule, Share, Use

Loss = Callable[[Tensor, Tensor], Tensor]


class _Call(NamedTuple):
    """One use of a layer: its inputs, as they were at that `version`, and where it output them."""

    layer: nn.Module
    inputs: list[Tensor]
    version: int
    output: GradientEdge


class _Recorder(GradSampleModule):  # type: ignore[misc]
    """Opacus' module, which notes the uses of layers; it needs no backward hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, loss_reduction="sum")
        self.calls: list[_Call] = []
        self._names = {layer: name for name, layer in model.named_modules()}

    def add_hooks(self, **options: Any) -> None:
        """Adds a forward hook to each layer that Opacus would hook."""
        self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks = []
        for layer in self.iterate_submodules(self._module):
            if type(layer) in (DPRNN, DPLSTM, DPGRU):
                continue  # made of linear layers
            if type(layer) not in self.GRAD_SAMPLERS:
                prepare_layer(layer)
            hook = layer.register_forward_hook(self.capture_activations_hook)
            self.autograd_grad_sample_hooks.append(hook)
        self.enable_hooks()

    def capture_activations_hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Notes a use of a layer."""
        if not isinstance(output, Tensor):
            raise self.refusal(module, "returns no single tensor")
        kept = [value.detach() for value in inputs]
        # the edge, not the output: what comes after may change the output in place
        self.calls.append(_Call(module, kept, kept[0]._version, get_gradient_edge(output)))

    def refusal(self, layer: nn.Module, reason: str) -> NotImplementedError:
        """Returns the error for a layer that cannot be taken."""
        name = f"{self._names[layer] or 'model'!r} ({type(layer).__name__})"
        return NotImplementedError(f"layer {name} {reason}: use the mode opacus-hooks")


class BookKeepingSum:
    """Sums of clipped gradients by a rule for each kind of layer, else by Opacus' samplers."""

    rules: ClassVar[Mapping[type[nn.Module], Rule]] = layers.RULES

    def __init__(self, model: nn.Module, loss: Loss, clip_norm: float) -> None:
        self._module = _Recorder(model)
        self._channels_last = any(p.dim() == 4 for p in model.parameters())
        if self._channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        named = model.named_parameters()
        self._names: dict[Tensor, str] = {p: name for name, p in named if p.requires_grad}
        self._loss, self._clip_norm = loss, clip_norm

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the clipped gradients of a physical batch."""
        total = self._loss(self._outputs(inputs), targets).sum()
        uses = self._uses(total, len(inputs))
        with torch.no_grad():
            shares = self._shares(uses)
            factors = clip_factors(joint_norms([share.norms for share in shares]), self._clip_norm)
            for share in shares:
                share.add_(sums[self._names[share.parameter]], factors)

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Returns the model's outputs; images lie with their channels last, if the model can.

        Pooling and patches are several times faster so. A model that views its tensors as if the
        channels came first fails, at its rehearsal, by their shapes alone.
        """
        self._module.calls = []  # a pass that was cut off, by lack of memory, leaves some
        outputs: Tensor
        if not (self._channels_last and inputs.dim() == 4):
            outputs = self._module(inputs)
            return outputs
        try:
            outputs = self._module(inputs.contiguous(memory_format=torch.channels_last))
            return outputs
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            self._channels_last = False
            self._module.to(memory_format=torch.contiguous_format)
            return self._outputs(inputs)

    def _uses(self, total: Tensor, examples: int) -> dict[nn.Module, list[Use]]:
        """Returns the uses of each layer with the gradients of their outputs."""
        calls, self._module.calls = self._module.calls, []
        edges = [call.output for call in calls]
        found = torch.autograd.grad([total], edges, allow_unused=True)
        uses: dict[nn.Module, list[Use]] = defaultdict(list)
        for call, backprops in zip(calls, found, strict=True):
            if call.inputs[0]._version != call.version:
                raise self._module.refusal(call.layer, "has an input that is changed in place")
            if backprops is None:
                continue
            if len(backprops) != examples or len(call.inputs[0]) != examples:
                raise self._module.refusal(call.layer, "has no first axis of examples")
            uses[call.layer].append((call.inputs, backprops))
        return uses

    def _shares(self, uses: dict[nn.Module, list[Use]]) -> list[Share]:
        """Returns a share for each released parameter."""
        users: dict[Tensor, int] = defaultdict(int)
        for layer in uses:
            for parameter in layer.parameters():
                users[parameter] += 1
        shares: list[Share] = []
        tied: dict[Tensor, Tensor] = {}
        for layer in list(uses):
            calls = uses.pop(layer)  # so that what formed rows replace is freed
            rule = self.rules.get(type(layer), layers.sampled)
            if all(users[parameter] == 1 for parameter in layer.parameters()):
                shares += rule(layer, calls)
                continue
            for weight, rows in layers.sampled_rows(layer, calls).items():
                tied[weight] = tied[weight] + rows if weight in tied else rows
        shares += [layers.formed(parameter, rows) for parameter, rows in tied.items()]
        reached: set[Tensor] = {share.parameter for share in shares}
        for released, name in self._names.items():
            if released not in reached:
                raise RuntimeError(f"no per-example gradient reached {name}")
        return shares


class GhostSum(BookKeepingSum):
    """The same with Opacus' own ghost norms, for the layers for which Opacus has them."""

    rules = layers.GHOST_RULES

    def _shares(self, uses: dict[nn.Module, list[Use]]) -> list[Share]:
        users: dict[Tensor, int] = defaultdict(int)
        for layer, calls in uses.items():
            for parameter in layer.parameters():
                users[parameter] += len(calls)
        for layer in uses:
            if type(layer) in self.rules and any(users[p] > 1 for p in layer.parameters()):
                raise NotImplementedError(
                    f"opacus-ghost takes no {type(layer).__name__} whose parameter is used twice: "
                    "use the mode opacus-hooks or book-keeping"
                )
        return super()._shares(uses)
