"""`bract contract`: make, show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from bract.shared import canonical
from bract.shared.cli import AS_JSON, print_json
from bract.shared.contract import Contract
from bract.shared.preparation import Images, Numeric, Table, Text
from bract.shared.reports.services import ContractShown
from bract.shared.terms import ADJACENCY, LEAST_NOISE, DataTerms, counted, of_rows_kept

_SHOWN = 6  # labels or categories of a line


@click.group()
def contract() -> None:
    """Propose a run; read one."""


@contract.command(epilog="Example: bract contract make FEDERATION.toml -o contract.json")
@click.argument("federation", type=click.Path(path_type=Path), metavar="FEDERATION.toml")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Where to write the signed contract; never overwritten.",
)
@AS_JSON
def make(federation: Path, output: Path, as_json: bool) -> None:
    """Sign the contract that a federation file describes, with σ calibrated to its budget."""
    from bract.shared import federation as federations
    from bract.shared import new_file

    new_file.check(output)
    chosen = federations.read(federation)
    signed = federations.propose(chosen)
    new_file.write(signed.to_bytes(), output)
    _tell(signed.contract, chosen.privacy.delta, as_json)


@contract.command(epilog="Example: bract contract show contract.json --delta 1e-5")
@click.argument("path", type=click.Path(path_type=Path), metavar="contract.json")
@click.option("--delta", type=float, metavar="D", default=1e-5, show_default=True, help="δ for ε.")
@AS_JSON
def show(path: Path, delta: float, as_json: bool) -> None:
    """Say what a contract asks of its sites, and what it would cost each of them.

    The signature is checked against the key that the contract names: compare that key with the one
    your coordinator told you.
    """
    from bract.shared import contract as contracts
    from bract.shared.privacy.calibration import check_budget

    check_budget(1.0, delta)
    signed = contracts.read(path)
    _tell(signed.verify(signed.contract.coordinator), delta, as_json)


def _tell(agreed: Contract, delta: float, as_json: bool) -> None:
    shown = _shown(agreed, delta)
    if as_json:
        print_json(shown.model_dump(mode="json"))
        return
    privacy, training, data = agreed.privacy, agreed.training, agreed.data
    lines = [
        f"contract     {agreed.sha256}",
        f"run          {agreed.run}",
        f"coordinator  {agreed.coordinator}",
        f"witness      {agreed.witness or 'none'}",
        f"model        {agreed.model.name} {agreed.model.options or ''}".rstrip(),
        f"data         {data.name}, {list(data.shape)}, {_learned(data)}",
        *(f"prepared     {line}" for line in _prepared(data)),
        f"rounds       {agreed.rounds}, at most {agreed.max_attempts} attempts, "
        f"{training.local_steps} steps each",
        f"asked        {_asked(agreed)}",
        f"mechanism    {privacy.mechanism}: q {privacy.sampling_rate:g}, σ "
        f"{privacy.noise_multiplier:g}, clip {privacy.clip_norm:g}, noise {privacy.randomness}",
        f"evaluation   {_evaluation(agreed)}",
        f"cost         {_cost(shown, agreed)}",
    ]
    without = "unbounded" if _untold(agreed) is None else "ε not computed"
    if shown.rows_per_person is not None:
        spent = without if shown.epsilon_person is None else f"ε {shown.epsilon_person:.3f}"
        rows = counted(shown.rows_per_person, "row")
        lines.append(f"a person     {rows} at the most: {spent}")
    if agreed.rows_per_person is not None:
        replaced = without if shown.epsilon_replaced is None else f"{shown.epsilon_replaced:.3f}"
        lines.append(f"a row        {of_rows_kept(agreed.rows_per_person, replaced)}")
    lines += [
        f"site         {site.name}: domain {site.domain}, nominal size {site.nominal_size}, "
        f"ledger key {site.key}"
        for site in agreed.cohort
    ]
    click.echo("\n".join(lines))


def _learned(data: DataTerms) -> str:
    if data.task == "value":
        return "a number is learned"
    return f"the next of {data.classes}" if data.task == "next-token" else f"{data.classes} classes"


def _prepared(data: DataTerms) -> Iterator[str]:
    """Yields how files become inputs: public constants, which an operator should recognise."""
    how = data.preparation
    if isinstance(how, Table):
        for column in how.columns:
            if isinstance(column, Numeric):
                yield f"{column.name}: a number from {column.low:g} to {column.high:g}"
            else:
                yield f"{column.name}: one of {_few(column.categories)}"
        target = how.target
        yield f"{target.name}: learned, " + (
            f"one of {_few(target.classes)}"
            if target.classes
            else f"from {target.low:g} to {target.high:g}"
        )
        if how.group is not None:
            yield f"{how.group}: tells persons apart"
    elif isinstance(how, Text):
        source = f" of {how.source}" if how.source else ""
        yield f"{how.length} tokens, {how.tokens}{source}; one of {_few(how.labels)}"
    elif isinstance(how, Images):
        colours = "colour" if how.colour else "grey"
        yield f"{how.height} × {how.width} pixels, {colours}; one of {_few(how.labels)}"


def _few(words: Sequence[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _evaluation(agreed: Contract) -> str:
    asked = agreed.evaluation
    if asked is None:
        return "none"
    return (
        f"every {asked.every} rounds, at most {agreed.max_evaluations} times: two counts leave "
        f"each site, with noise of stddev {2**0.5 * asked.noise_multiplier:g}"
    )


def _asked(agreed: Contract) -> str:
    count, some = len(agreed.cohort), agreed.sites_per_round
    return "all sites, in each round" if some is None else f"{some} of {count} sites, in each round"


def _cost(shown: ContractShown, agreed: Contract) -> str:
    if (noise := _untold(agreed)) is not None:
        return (
            f"ε not computed: at σ {noise:g}, under {LEAST_NOISE:g}, it is in the thousands and "
            "takes gigabytes"
        )
    if shown.epsilon is None or shown.epsilon_rounds is None:
        return "unbounded: this contract has no privacy at this δ"
    return (
        f"ε {shown.epsilon:.3f} at δ {shown.delta:g} ({ADJACENCY}, per {agreed.privacy.unit}) to "
        f"each site if every attempt is used; {shown.epsilon_rounds:.3f} for {agreed.rounds} rounds"
    )


def _untold(agreed: Contract) -> float | None:
    """Returns the noise multiplier for which ε is not computed, None where it is."""
    if agreed.privacy.mechanism == "none":
        return None  # which is told at once: ε is unbounded
    least = min(terms.noise_multiplier for terms in (agreed.privacy, agreed.evaluation) if terms)
    return least if least < LEAST_NOISE else None


def _shown(agreed: Contract, delta: float) -> ContractShown:
    from bract.shared.privacy import accounting, entries
    from bract.shared.privacy.events import Event

    def events(attempts: int) -> tuple[Event, ...]:
        return entries.events_of_attempts(agreed, attempts=attempts, completed=agreed.rounds)

    def finite(spent: Callable[[], float]) -> float | None:
        return None if _untold(agreed) is not None else canonical.finite(spent())

    every, rows = events(agreed.max_attempts), agreed.data.rows_per_person
    facts: dict[str, Any] = agreed.model_dump(mode="json")
    return ContractShown(
        contract_sha256=agreed.sha256,
        contract=facts,
        epsilon=finite(lambda: accounting.epsilon(every, delta)),
        epsilon_rounds=finite(lambda: accounting.epsilon(events(agreed.rounds), delta)),
        rows_per_person=rows,
        epsilon_person=rows and finite(lambda: accounting.epsilon_of_person(every, delta, rows)),
        epsilon_replaced=rows and finite(lambda: accounting.epsilon_replace_one(every, delta)),
        delta=delta,
        adjacency=agreed.privacy.adjacency,
    )
