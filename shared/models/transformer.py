"""A small transformer over tokens: one answer a text, or the next token at every place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bract.shared.errors import UnknownName
from bract.shared.models import pooling
from bract.shared.terms import Task

ENDED = 0
POSITIONS = ("learned", "rope")
_LONGEST_WAVE = 10_000.0


def transformer(
    shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int,
    task: Task = "classes",
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    positions: str = "learned",
    hidden: int = 0,
    init_std: float = 1.0,
) -> nn.Module:
    """Returns a pre-norm transformer (Xiong et al. 2020, arXiv 2002.04745) without dropout.

    Token 0 means that the text has ended. "next-token" is causal and answers (examples, places,
    classes); any other task attends to the places before the end, and answers (examples, classes)
    from their mean. `positions`: "learned", an embedding of places, or "rope", rotations of queries
    and keys (Su et al. 2021, arXiv 2104.09864). `hidden` is the perceptrons' width, 0 for
    4·`width`; `init_std` that of the embeddings' normal start.

    Raises:
        UnknownName: for unknown positions.
        ValueError: where a size is below 1, or the heads do not divide the width.
    """
    if positions not in POSITIONS:
        raise UnknownName("positions", positions, POSITIONS)
    if min(width, layers, heads) < 1 or hidden < 0:
        raise ValueError(f"width {width}, layers {layers} and heads {heads} must be at least 1")
    parts = 2 * heads if positions == "rope" else heads  # a rotation turns pairs of features
    if width % parts:
        raise ValueError(f"width {width} must divide by {parts} for {heads} heads and {positions}")
    body = [Block(width, heads, hidden or 4 * width, task == "next-token", positions == "rope")
            for _ in range(layers)]  # fmt: skip
    model = Transformer(
        tokens=nn.Embedding(vocabulary, width),
        places=nn.Embedding(shape[0], width) if positions == "learned" else None,
        blocks=body,
        out=nn.Linear(width, classes),
    )
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=init_std)
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.out.bias)
    return model


class Transformer(nn.Module):
    """Embeddings, blocks, a last norm and a dense layer."""

    def __init__(
        self,
        *,
        tokens: nn.Embedding,
        places: nn.Embedding | None,
        blocks: list[Block],
        out: nn.Linear,
    ) -> None:
        super().__init__()
        self.tokens, self.places = tokens, places
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.out = nn.LayerNorm(tokens.embedding_dim), out
        self.pools = not blocks[0].causal

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits: (examples, classes), or (examples, places, classes) without pooling."""
        there = pooling.present(tokens, ENDED)
        hidden: Tensor = self.tokens(tokens)
        if self.places is not None:
            # a row of places for every example: a gradient has its examples on the first axis
            places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            hidden = hidden + self.places(places.contiguous())
        for block in self.blocks:
            hidden = block(hidden, there)
        hidden = self.norm(hidden)
        logits: Tensor = self.out(pooling.mean(hidden, there) if self.pools else hidden)
        return logits


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a residual.

    It is made of called layers, which have a rule for gradients of every example.
    """

    def __init__(self, width: int, heads: int, hidden: int, causal: bool, rotates: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotates = heads, causal, rotates
        self.before_attention, self.before_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Returns (examples, places, width); `there` says which places may be attended to."""
        projected = self.query_key_value(self.before_attention(x))
        parts = projected.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        if self.rotates:
            query, key = rotated(query), rotated(key)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if self.causal else there[:, None, None],
            is_causal=self.causal,
        )
        x = x + self.mixed(attended.transpose(1, 2).reshape(x.shape))
        hidden: Tensor = self.out(functional.gelu(self.hidden(self.before_hidden(x))))
        return x + hidden


def rotated(x: Tensor) -> Tensor:
    """Returns (…, places, features) with pairs of features turned by an angle of their place.

    Feature i and feature i + half make pair i, turned by place · 10000^(−i / half).
    """
    places, half = x.shape[-2], x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=x.dtype)
    speeds = torch.exp(-math.log(_LONGEST_WAVE) / half * steps)
    angles = torch.arange(places, device=x.device, dtype=x.dtype)[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)
