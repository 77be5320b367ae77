"""A model card: what a trained model is, what it was trained on, and what may be claimed of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bract.shared.contract import Contract
from bract.shared.reports.runs import (
    GUARANTEE_PRIVATE,
    GUARANTEE_SIMULATION,
    GUARANTEE_UNPROTECTED,
    SCORES,
    Guarantee,
    ServerSummary,
    Summary,
)
from bract.shared.terms import of_rows_kept
from bract.shared.trained import labels_of

_LOADING: Final = {
    "safetensors": (
        "from safetensors.numpy import load_file",
        'weights = load_file("{name}")  # of the model `{model}` of bract.shared.models',
    ),
    "torch": (
        "import torch",
        'model = torch.export.load("{name}").module()',
        "outputs = model(inputs)",
    ),
    "onnx": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession("{name}")',
        '(outputs,) = session.run(None, {{"inputs": inputs}})',
    ),
}
_SITES: Final = 100  # of them a card lists


def card(
    agreed: Contract,
    summary: Summary | ServerSummary,
    *,
    file: Path,
    form: str,
    unproven: Sequence[str] = (),
) -> str:
    """Returns the card as Markdown.

    Args:
        agreed: the run's contract.
        summary: what is known of the run; the privacy that it claims is the card's.
        file: the exported model, which lies beside the card.
        form: its format, one of `exports.FORMATS`.
        unproven: what nothing but the summary says, in sentences.
    """
    model, training = agreed.model, agreed.training
    options = "".join(f", {name} {value}" for name, value in sorted(model.options.items()))
    loading = [line.format(name=file.name, model=model.name) for line in _LOADING[form]]
    lines = [
        f"# {agreed.run}",
        "",
        f"Model `{model.name}`{options}, trained by bract over {len(agreed.cohort)} sites in "
        f"{summary.rounds} rounds of {training.local_steps} steps. This file: `{file.name}`.",
        "",
        "## Privacy",
        "",
        " ".join([claim(agreed, summary), *unproven]),
        "",
        "## Data",
        "",
        f"Data set `{agreed.data.name}`; contract `{agreed.sha256}`.",
        "",
        "| site | domain | nominal size |",
        "|---|---|---|",
        *_sites(agreed),
        "",
        "## Scores",
        "",
        "On public test examples that no site trained on.",
        "",
        "| what | value |",
        "|---|---|",
        *_figures(summary),
        "",
        "## Use",
        "",
        "```python",
        *loading,
        "```",
        "",
        *_interface(agreed, form),
        "",
    ]
    return "\n".join(lines)


def guarantee(agreed: Contract, summary: Summary | ServerSummary) -> Guarantee:
    """Returns what may be claimed: nothing where the noise was seeded, whatever a summary says."""
    if agreed.privacy.mechanism == "none":
        return GUARANTEE_UNPROTECTED
    if agreed.simulation or agreed.privacy.randomness == "seeded":
        return GUARANTEE_SIMULATION
    return summary.guarantee


def claim(agreed: Contract, summary: Summary | ServerSummary) -> str:
    """Returns the privacy of a run in a sentence, and of which rows it holds where not of all."""
    claimed = guarantee(agreed, summary)
    epsilon = summary.epsilon if isinstance(summary, Summary) else summary.epsilon_run
    if claimed == GUARANTEE_UNPROTECTED:
        return f"{claimed}: nothing was clipped or noised."
    spent = "unbounded" if epsilon is None else f"{epsilon:.4f}"
    privacy = agreed.privacy
    cost = (
        f"ε = {spent} at δ = {summary.delta:g}, {privacy.adjacency} adjacency, per {privacy.unit}"
    )
    rows = _of_rows(agreed, summary)
    if claimed != GUARANTEE_PRIVATE:
        return (
            f"{claimed}; the noise came from a seed, and kept secret it would have cost each site "
            f"at most {cost}.{rows}"
        )
    alone = not isinstance(summary, Summary)  # a server knows its own run
    counted = "every attempt of this run that receipts show" if alone else "the worst site's ledger"
    seen = "every update of this run" if alone else "every update that the site released"
    more = "; what other runs on the same data cost, the site's ledger adds up" if alone else ""
    return (
        f"{claimed}: {cost}, counted over {counted}, for each site's examples against anyone who "
        f"sees {seen} and all other sites' data{more}.{rows}"
    )


def _of_rows(agreed: Contract, summary: Summary | ServerSummary) -> str:
    """Returns of which persons' examples the ε holds, nothing where that is all of them."""
    told = (agreed.rows_per_person, summary.rows_kept)
    rows = [row for row in told if row is not None]
    if not rows:
        return ""
    spent = summary.epsilon_replaced  # which an earlier version's summary does not tell
    replaced = "not bounded here" if spent is None else f"{spent:.4f}"
    return f" {of_rows_kept(min(rows), replaced, 'example')}."


def _sites(agreed: Contract) -> Iterator[str]:
    for site in agreed.cohort[:_SITES]:
        yield f"| {site.name} | {site.domain} | {site.nominal_size} |"
    if len(agreed.cohort) > _SITES:
        yield f"| and {len(agreed.cohort) - _SITES} more, in contract.json | | |"


def _figures(summary: Summary | ServerSummary) -> Iterator[str]:
    for name, words in SCORES.items():
        value = getattr(summary, name)
        if value is not None:
            yield f"| {words} | {value:.4f} |"
    for group, accuracy in (summary.test_accuracy_by_group or {}).items():
        yield f"| accuracy, {group} | {accuracy:.4f} |"
    if summary.local_accuracy_worst is not None:
        yield (
            f"| local accuracy of the worst site, {summary.local_accuracy_worst_site}, noised "
            f"| {summary.local_accuracy_worst:.4f} |"
        )


def _interface(agreed: Contract, form: str) -> Iterator[str]:
    """Yields what goes in and what comes out."""
    data = agreed.data
    shape = ", ".join(["examples", *map(str, data.shape)])
    if data.vocabulary is not None:
        yield f"- Inputs: int64 of ({shape}), tokens from 0 below {data.vocabulary}."
    else:
        done = "is part of this file" if form != "safetensors" else "is yours to do first"
        yield (
            f"- Inputs: float32 of ({shape}), as they stand in the data; "
            f"(x − {data.offset:g}) / {data.scale:g} {done}."
        )
    if data.preparation is not None:
        yield (
            f"- A {data.preparation.kind} becomes inputs by the preparation in contract.json: "
            "`bract model predict` does that."
        )
    if data.task == "value":
        unit = "in the file's own unit" if form != "safetensors" else "between −1 and 1"
        yield f"- Outputs: float32 of (examples, 1), the value {unit}."
    elif data.task == "next-token":
        yield "- Outputs: float32 scores of the token after each place; softmax gives odds."
    else:
        names = labels_of(data)
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        yield (
            f"- Outputs: float32 of (examples, {data.classes}), a score for each of {shown}; their "
            "softmax are the probabilities."
        )
