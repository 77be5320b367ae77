"""Clipped sums from one forward and one backward pass that forms no gradient of a parameter.

Book-keeping, Bu, Wang, Zha & Karypis 2023 (arXiv 2210.00038): the backward pass goes through the
outputs of the layers and no further; their gradients and the layers' inputs give every example's
norm, then the weighted sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bract.client.training import layers, products
from bract.client.training.clipping import (
    WHOLE,
    are_joined,
    clip_factors,
    joint_norms,
    row_norms,
    weighted_sums,
)
from bract.client.training.shares import Formed, Rule, Share, Shares, Use
from bract.shared.models.layout import Layout
from bract.shared.tasks import full

Loss = Callable[[Tensor, Tensor], Tensor]


class _Recorder(GradSampleModule):  # type: ignore[misc]
    """Opacus' module, which hands the uses of a layer to its rule as the last one is reached.

    Attributes:
        shares: what the rules returned.
        sources: the outputs of layers that lie behind no other layer: where a backward pass ends.
    """

    def __init__(self, model: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> None:
        super().__init__(model, loss_reduction="sum")
        self._rules = rules
        self._layers = {layer: name for name, layer in model.named_modules()}
        users = Counter(p for layer in self.hooked for p in layer.parameters())
        self._shares_none = {
            layer: all(users[p] == 1 for p in layer.parameters()) for layer in self.hooked
        }
        self.clear()

    def clear(self) -> None:
        """Forgets a pass; one that was cut off, by lack of memory, leaves much behind."""
        self.shares: Shares = []
        self.sources: list[GradientEdge] = []
        self.calls: Counter[nn.Module] = Counter()
        self._uses: dict[nn.Module, list[Use]] = {}
        self._tied: dict[Tensor, Tensor] = {}

    def add_hooks(self, **options: Any) -> None:
        """Adds a forward hook to each layer that Opacus would hook, and no backward hook."""
        self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks = []
        recurrent = (DPRNN, DPLSTM, DPGRU)  # made of linear layers
        found = [x for x in self.iterate_submodules(self._module) if type(x) not in recurrent]
        for layer in found:
            if type(layer) not in self.GRAD_SAMPLERS:
                prepare_layer(layer)
            hook = layer.register_forward_hook(self.capture_activations_hook)
            self.autograd_grad_sample_hooks.append(hook)
        self.__dict__["hooked"] = found
        self.enable_hooks()

    def capture_activations_hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Notes a use of a layer, and asks for the gradient of its output as it is now."""
        if not (self.hooks_enabled and torch.is_grad_enabled()):
            return
        if not isinstance(output, Tensor):
            raise self._refusal(module, "returns no single tensor")
        if not any(value.requires_grad for value in inputs):
            self.sources.append(get_gradient_edge(output))
        self.calls[module] += 1
        kept = [value.detach() for value in inputs]
        reached = partial(self._reached, module, kept, kept[0]._version)
        output.register_hook(reached)  # type: ignore[no-untyped-call]  # torch's

    def _reached(
        self, layer: nn.Module, inputs: list[Tensor], version: int, backprops: Tensor
    ) -> None:
        if inputs[0]._version != version:
            raise self._refusal(layer, "has an input that is changed in place")
        uses = self._uses.setdefault(layer, [])
        # what is measured is what is added
        uses.append(([full(value) for value in inputs], full(backprops)))
        if len(uses) == self.calls[layer]:
            self._settle(layer)

    def _settle(self, layer: nn.Module) -> None:
        uses = self._uses.pop(layer)
        if self._shares_none[layer]:
            self.shares += self._rules.get(type(layer), layers.sampled)(layer, uses)
            return
        for weight, rows in layers.sampled_rows(layer, uses).items():
            self._tied[weight] = self._tied[weight] + rows if weight in self._tied else rows

    def finished(self, examples: int) -> Shares:
        """Returns the shares of the pass, one a parameter that was reached."""
        for layer in list(self._uses):  # an output that nothing came back to
            self._settle(layer)
        shares = [*self.shares, *(Formed(weight, rows) for weight, rows in self._tied.items())]
        for share in shares:
            found = len(share.rows if isinstance(share, Formed) else share.norms)
            if found != examples:
                raise NotImplementedError(
                    f"a layer has {found} gradients for {examples} examples: its first "
                    "axis must be that of the examples"
                )
        self.clear()
        return shares

    def _refusal(self, layer: nn.Module, reason: str) -> NotImplementedError:
        name = f"{self._layers[layer] or 'model'!r} ({type(layer).__name__})"
        return NotImplementedError(f"layer {name} {reason}: use the mode opacus-hooks")


class BookKeepingSum:
    """Sums of clipped gradients by a rule for each kind of layer, else by Opacus' samplers.

    The weights of a model for images are kept with their channels last.

    Args:
        model: whose released parameters.
        loss: of each example.
        clip_norm: C.
        halves: whether products of the two passes are in bfloat16; losses, norms and sums are not.
    """

    rules: ClassVar[Mapping[type[nn.Module], Rule]] = layers.RULES

    def __init__(
        self, model: nn.Module, loss: Loss, clip_norm: float, *, halves: bool = False
    ) -> None:
        self._module = _Recorder(model, self.rules)
        self._layout = Layout(model)
        named = model.named_parameters()
        self._names: dict[Tensor, str] = {p: name for name, p in named if p.requires_grad}
        self._loss, self._clip_norm, self._halves = loss, clip_norm, halves

    def add_(
        self,
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Adds the clipped gradients of a physical batch, or of those examples that are counted."""
        totals = {name: value[None] for name, value in sums.items()}
        self.add_parts_(totals, WHOLE, inputs, targets, counted)

    def add_parts_(
        self,
        totals: Mapping[str, Tensor],
        parts: Sequence[slice],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Adds the clipped gradients of each part of the examples to a total, in one pass.

        Args:
            totals: by parameter, a part on the first axis.
            parts: which examples are whose.
            inputs: of all examples.
            targets: of all examples.
            counted: which examples add anything, of booleans; None all.
        """
        try:
            self._add_(totals, parts, inputs, targets, counted)
        except BaseException:
            self._module.clear()
            products.give_back(self._names)
            raise

    def _add_(
        self,
        totals: Mapping[str, Tensor],
        parts: Sequence[slice],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None,
    ) -> None:
        self._layout.run(lambda lying: self._pass(lying, targets), inputs)
        with torch.no_grad():
            shares = self._module.finished(len(inputs))
            if missing := self._names.keys() - {share.parameter for share in shares}:
                names = ", ".join(sorted(self._names[p] for p in missing))
                raise RuntimeError(f"no per-example gradient reached {names}")
            by_parameter = {p: totals[name] for p, name in self._names.items()}
            _add_clipped_(by_parameter, shares, self._clip_norm, parts, counted)

    def _pass(self, inputs: Tensor, targets: Tensor) -> None:
        """Goes forward and back; the module holds the shares then, and nothing is added yet."""
        self._module.clear()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._halves):
            outputs = self._outputs(inputs)
        total = self._loss(full(outputs), targets).sum()
        torch.autograd.grad([total], self._module.sources, allow_unused=True)

    def _outputs(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self._module(inputs)
        return outputs


def _add_clipped_(
    totals: Mapping[Tensor, Tensor],
    shares: Shares,
    clip_norm: float,
    parts: Sequence[slice],
    counted: Tensor | None = None,
) -> None:
    """Adds Σ f_i·g_i of each part to the parameters' totals; joined rows are taken as one."""
    apart, joined = list[Share | Formed](), list[Formed]()
    for share in shares:
        if isinstance(share, Formed) and are_joined(share.rows, share.parameter.numel()):
            joined.append(share)
        else:
            apart.append(share)
    norms = [share.norms for share in apart]
    if joined:
        rows = torch.cat([share.rows.reshape(len(share.rows), -1) for share in joined], 1)
        norms.append(row_norms(rows))
    factors = clip_factors(joint_norms(norms), clip_norm)
    if counted is not None:
        factors = torch.where(counted, factors, 0.0)
    for share in apart:
        share.add_(totals[share.parameter], factors, parts)
    if joined:
        widths = [share.parameter.numel() for share in joined]
        sums = torch.split(weighted_sums(factors, rows, parts), widths, 1)
        theirs = [totals[share.parameter] for share in joined]
        found = [some.view(total.shape) for some, total in zip(sums, theirs, strict=True)]
        torch._foreach_add_(theirs, found)


class GhostSum(BookKeepingSum):
    """The same with Opacus' own ghost norms, for the layers for which Opacus has them."""

    rules = layers.GHOST_RULES

    def _outputs(self, inputs: Tensor) -> Tensor:
        outputs = super()._outputs(inputs)
        users: Counter[Tensor] = Counter()
        for layer, times in self._module.calls.items():
            users.update({parameter: times for parameter in layer.parameters()})
        for layer in self._module.calls:
            if type(layer) in self.rules and any(users[p] > 1 for p in layer.parameters()):
                raise NotImplementedError(
                    f"opacus-ghost takes no {type(layer).__name__} whose parameter is used twice: "
                    "use the mode opacus-hooks or book-keeping"
                )
        return outputs
