"""The share of an embedding: gradients by (example, token), never one-hot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bract.client.training.clipping import WHOLE, on_gpu, row_norms, without_dropped
from bract.client.training.products import side
from bract.client.training.shares import Share, Shares, Use


def embedding(layer: nn.Embedding, uses: Sequence[Use]) -> Shares:
    """Returns the share of an embedding: gradients by (example, token), never one-hot."""
    tokens = torch.cat([inputs[0].reshape(len(b), -1) for inputs, b in uses], 1)
    found = [without_padding(layer, inputs[0], b) for inputs, b in uses]
    backprops = side([b[:, None] if b.dim() == 2 else b for b in found])
    owners = torch.arange(len(tokens), device=tokens.device)[:, None] * layer.num_embeddings
    pairs, place = _distinct((owners + tokens).flatten())
    rows = backprops.new_zeros((len(pairs), backprops.shape[2]), dtype=torch.float64)
    rows.index_add_(0, place, backprops.double().flatten(0, 1))
    example, token = pairs // layer.num_embeddings, pairs % layer.num_embeddings
    squares = rows.new_zeros(len(tokens)).index_add_(0, example, row_norms(rows).square())

    def add_(totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE) -> None:
        for total, part in zip(totals, parts, strict=True):
            some, weights = _pairs_of(part, example, factors)
            kept = without_dropped(weights, rows[some])
            total.index_add_(0, token[some], kept * weights[:, None])

    return [Share(layer.weight, squares.sqrt(), add_)]


def _pairs_of(part: slice, example: Tensor, factors: Tensor) -> tuple[slice, Tensor]:
    """Returns which pairs, sorted by example, are of a part of the examples, and their factors.

    On a GPU all are, with the factor 0 outside the part: to ask where it ends would be to wait.
    """
    start, stop, _ = part.indices(len(factors))
    if (start, stop) == (0, len(factors)):
        return slice(None), factors[example]
    if on_gpu(example):
        inside = (example >= start) & (example < stop)
        return slice(None), torch.where(inside, factors[example], 0.0)
    ends = torch.searchsorted(example, example.new_tensor([start, stop])).tolist()
    return slice(*ends), factors[example[slice(*ends)]]


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct keys, and the place of each key among them.

    On a GPU as many as there are keys, zeros after the last: to ask how many are distinct would be
    to wait for it.
    """
    if on_gpu(keys):
        return _distinct_by_sorting(keys)
    found: tuple[Tensor, Tensor] = torch.unique(keys, return_inverse=True)
    return found


def _distinct_by_sorting(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered, order = keys.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    places = first.cumsum(0) - 1
    distinct = torch.zeros_like(keys).scatter_(0, places, ordered)
    return distinct, torch.empty_like(keys).scatter_(0, order, places)


def without_padding(layer: nn.Module, tokens: Tensor, backprops: Tensor) -> Tensor:
    """Returns the gradients without those of an embedding's padding, which autograd leaves out."""
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
        return backprops
    return torch.where((tokens == layer.padding_idx)[..., None], 0.0, backprops)


def padding_rows(model: nn.Module) -> list[tuple[str, int]]:
    """Returns the rows of weights, by name, that no gradient reaches: an embedding's padding.

    Of a weight that another layer uses too, as one tied to the output does, all rows are trained.
    """
    users: Counter[Tensor] = Counter(
        p for layer in model.modules() for p in layer.parameters(False)
    )
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    return [
        (names[layer.weight], layer.padding_idx)
        for layer in model.modules()
        if isinstance(layer, nn.Embedding)
        and layer.padding_idx is not None
        and layer.weight in names
        and users[layer.weight] == 1
    ]
