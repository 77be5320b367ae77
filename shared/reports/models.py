"""What is said of a trained model, its answers and its exports."""

from __future__ import annotations

from typing import Literal

from bract.shared.configuration import Frozen
from bract.shared.reports.runs import Guarantee, Scores


class ModelScores(Scores):
    """`bract model evaluate --json`: a run's model on public test examples.

    `agrees` is whether the summary beside it is of this model and these figures are its; null where
    there is no summary.
    """

    run: str
    examples: int
    contract_sha256: str
    agrees: bool | None


class ModelPredictions(Frozen):
    """`bract model predict --json`."""

    run: str
    output: str
    rows: int
    contract_sha256: str


class ModelExport(Frozen):
    """`bract model export --json`.

    `greatest_difference` is of the file's answers from the model's on made-up inputs, relative to
    the greatest answer where that is over 1; `sha256` and `bytes` are the file's. `unproven` says
    what on the card is the run's own word.
    """

    run: str
    format: Literal["safetensors", "torch", "onnx"]
    output: str
    card: str
    sha256: str
    bytes: int
    greatest_difference: float
    guarantee: Guarantee
    unproven: list[str]
    contract_sha256: str
