"""A recurrent network over tokens, of Opacus' LSTM: torch's own has no gradient per example."""

from __future__ import annotations

from torch import Tensor, nn

from bract.shared.models import pooling
from bract.shared.terms import Task

ENDED = 0


def lstm(
    shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int,
    task: Task = "classes",
    width: int = 32,
    hidden: int = 64,
    layers: int = 1,
) -> nn.Module:
    """Returns an embedding of `width`, `layers` of `hidden` cells and a dense layer.

    Token 0 means that the text has ended. "next-token" answers (examples, places, classes) from the
    cells at each place, any other task (examples, classes) from their mean before the end.

    Raises:
        ValueError: where a size is below 1.
    """
    for name, size in (("width", width), ("hidden", hidden), ("layers", layers)):
        if size < 1:
            raise ValueError(f"{name} {size} must be at least 1")
    from opacus.layers import DPLSTM  # takes seconds, and most runs need none

    return Recurrent(
        tokens=nn.Embedding(vocabulary, width),
        cells=DPLSTM(width, hidden, num_layers=layers, batch_first=True),
        out=nn.Linear(hidden, classes),
        pools=task != "next-token",
    )


class Recurrent(nn.Module):
    """Tokens to a dense layer by way of recurrent cells."""

    def __init__(
        self, *, tokens: nn.Embedding, cells: nn.Module, out: nn.Linear, pools: bool
    ) -> None:
        super().__init__()
        self.tokens, self.cells, self.out, self.pools = tokens, cells, out, pools

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits: (examples, classes), or (examples, places, classes) without pooling."""
        hidden: Tensor = self.cells(self.tokens(tokens))[0]
        if self.pools:
            hidden = pooling.mean(hidden, pooling.present(tokens, ENDED))
        logits: Tensor = self.out(hidden)
        return logits
