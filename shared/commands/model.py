"""`bract model`: evaluate, predict, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bract.shared import garbage
from bract.shared.cli import AS_JSON, DATA_DIR, fail_reported, print_json, shown
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.reports.models import ModelExport, ModelPredictions, ModelScores
from bract.shared.reports.runs import Scores

if TYPE_CHECKING:
    from bract.shared.contract import Contract
    from bract.shared.trained import Trained

RUN = click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
OUTPUT = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The file to write; never overwritten.",
)


@click.group()
def model() -> None:
    """Use what was trained: RUN is a run's folder."""


@model.command(epilog="Example: bract model evaluate runs/mine")
@RUN
@DATA_DIR
@click.option(
    "--public-data",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The folder or the file that holds the public examples, where it is your own.",
)
@AS_JSON
def evaluate(run: Path, data_dir: Path | None, public_data: Path | None, as_json: bool) -> None:
    """Score a model on the public test examples of its contract; opens nothing private.

    Fails, after its report, where the summary beside the model is not of it, or says otherwise.
    """
    with garbage.unwatched():
        from bract.shared import trained as runs
        from bract.shared.data import load_public
        from bract.shared.evaluation import Evaluator

    trained = runs.read(run)
    agreed = trained.contract
    where = _public(agreed, data_dir, public_data)
    _, test = load_public(agreed.data, where)
    scores = Scores(**Evaluator(trained.model, agreed.data).report(trained.weights, test))
    summarised = (run / runs.SUMMARY).exists()
    fault = _departure(trained, scores) if summarised else None
    report = ModelScores(
        run=agreed.run,
        examples=len(test),
        contract_sha256=agreed.sha256,
        agrees=fault is None if summarised else None,
        **scores.model_dump(),
    )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print_scores(report)
    if fault is not None:
        fail_reported(fault)


def _departure(trained: Trained, found: Scores) -> str | None:
    """Returns why a summary is not of what was found, None where it is."""
    try:
        said = trained.summary()
    except BractError as error:
        return str(error)
    names = ", ".join(found.departures(said))
    if not names:
        return None
    return (
        f"{trained.folder / 'summary.json'} says otherwise of this model ({names}): copy it again"
    )


def _print_scores(report: ModelScores) -> None:
    click.echo(f"{report.run}, {report.examples} public test examples: {report.line}")
    areas = report.test_auc_by_group or {}
    for group, accuracy in (report.test_accuracy_by_group or {}).items():
        click.echo(f"{group}: test accuracy {shown(accuracy)}   AUC {shown(areas.get(group))}")
    if report.agrees is None:
        click.echo("no summary.json lies beside it to hold these figures against")


@model.command(epilog="Example: bract model predict runs/mine patients.csv -o answers.csv")
@RUN
@click.argument(
    "inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT..."
)
@OUTPUT
@AS_JSON
def predict(run: Path, inputs: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Write the rows of INPUT with the model's answers beside them.

    As the contract's data are: CSV for a table or for plain numbers, JSON lines with a "text",
    images or folders of them (a CSV comes back); always .npz with an array "inputs". Of text the
    answer to "what is the next token?" is the one after the row's last place.
    """
    with garbage.unwatched():
        from bract.shared import prediction
        from bract.shared import trained as runs

    trained = runs.read(run)
    report = ModelPredictions(
        run=trained.contract.run,
        output=str(output),
        rows=prediction.predict(trained, inputs, output),
        contract_sha256=trained.contract.sha256,
    )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        click.echo(f"{report.output}: {report.rows} rows")


@model.command(epilog="Example: bract model export runs/mine --format onnx -o model.onnx")
@RUN
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "torch", "onnx"]),
    required=True,
    help="Weights alone, or a graph that takes inputs as they are read.",
)
@OUTPUT
@AS_JSON
def export(run: Path, form: str, output: Path, as_json: bool) -> None:
    """Write a model for others, and beside it FILE.md, its card: privacy, data, scores, use.

    "torch" is a program of torch.export (.pt2), "onnx" one for ONNX runtimes; both are run beside
    the model on made-up inputs before they are written.
    """
    with garbage.unwatched():
        from bract.shared import canonical, card, exports, new_file
        from bract.shared import trained as runs

    beside = output.with_name(f"{output.name}.md")
    for path in (output, beside):
        new_file.check(path)
    trained = runs.read(run)
    summary = trained.summary()
    made = exports.export(trained, form)
    unproven = trained.unproven(summary)
    text = card.card(trained.contract, summary, file=output, form=form, unproven=unproven)
    new_file.write(made.content, output)
    new_file.write(text.encode(), beside)
    report = ModelExport.model_validate(
        {
            "run": trained.contract.run,
            "format": form,
            "output": str(output),
            "card": str(beside),
            "sha256": canonical.sha256(made.content),
            "bytes": len(made.content),
            "greatest_difference": made.greatest_difference,
            "guarantee": card.guarantee(trained.contract, summary),
            "unproven": unproven,
            "contract_sha256": trained.contract.sha256,
        }
    )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        told = " ".join([card.claim(trained.contract, summary), *unproven])
        click.echo(f"{report.output} and {report.card}: {told}")


def _public(agreed: Contract, root: Path | None, named: Path | None) -> Path | None:
    """Returns where the public examples lie, None where they are found by name.

    Raises:
        UsageError: where nothing is there.
        VerificationFailed: where they are not those that the contract declares.
    """
    from bract.shared.data import public
    from bract.shared.data.locations import folder_of

    if named is not None and not named.exists():
        raise UsageError(f"no public examples at {named}: correct --public-data")
    where = named or folder_of(agreed.data.name, folder=None, root=root)
    if agreed.data.public not in (None, public.sha256(agreed.data, where)):
        raise VerificationFailed(
            "the public examples here are not those that the contract declares: name their folder "
            "with --public-data"
        )
    return where
