"""The ledgers that `bract audit`'s commands read, and what is held against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bract.shared.errors import LedgerError, UsageError

if TYPE_CHECKING:
    from bract.shared.privacy.verification import Verified

_Command = TypeVar("_Command", bound=Callable[..., Any])

LEDGERS = click.argument(
    "ledgers", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="LEDGER..."
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a user holds against a ledger; what is not given is looked for beside it."""

    site_key: str | None = None
    contract: Path | None = None
    head: Path | None = None
    received: Path | None = None


HEAD = click.option(
    "--head",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Heads or witnesses seen elsewhere (as in summary.json): the anchor.",
)


def known_end(entries: int, anchor: int | None) -> str:
    """Returns in words up to where a chain is known to be whole."""
    known, last = ("whole", entries - 1) if anchor is None else ("anchored", anchor)
    return f"{known} up to entry {last}, later ones cannot be excluded"


def pinned(command: _Command) -> _Command:
    """Returns a command with the options that pin a ledger's key."""
    for option in (
        click.option(
            "--contract",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A signed contract that lists the site's key; pins it.",
        ),
        click.option(
            "--site-key", metavar="K", help="The site's public key, hexadecimal; pins it."
        ),
    ):
        command = option(command)
    return command


def verified(path: Path, evidence: Evidence) -> list[Verified]:
    """Returns the chains of a ledger, or of an export, where every one of them holds.

    Raises:
        VerificationFailed: naming the fault.
        UsageError: where what is held against it cannot be read.
    """
    from bract.shared.privacy import anchors, receipts, verification

    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: name the .sqlite file, or an export of it")
    run = path.resolve().parent.parent
    contract = evidence.contract or run / "contract.json"
    keys = anchors.site_keys(path, evidence.site_key, contract)
    taken = evidence.received or run / "receipts.jsonl"
    heads, witnesses = _anchors(run, evidence.head)
    return verification.verify(
        path,
        site_keys=keys,
        anchors=heads,
        witnesses=witnesses,
        witness_keys=anchors.witness_keys(contract),
        received=receipts.read(taken) if evidence.received or taken.exists() else None,
    )


def check_forks(paths: Sequence[Path]) -> None:
    """Returns where no two of some verified ledgers hold two histories of one chain.

    Raises:
        VerificationFailed: naming the two, and the entry at which they part.
    """
    from bract.shared.privacy import evidence, export

    if len(paths) > 1:
        evidence.check_forks({str(path): export.contents(path) for path in paths})


def _anchors(run: Path, given: Path | None) -> Any:
    from bract.shared.privacy import anchors

    if given is None:
        # A run that was stopped has no summary yet; its checkpoint holds the heads last signed.
        beside = (run / "summary.json", run / "checkpoint" / "state.json")
        return next((anchors.heads(file) for file in beside if file.exists()), {}), ()
    known, witnesses = anchors.heads(given), anchors.witnesses(given)
    if not known and not witnesses:
        raise UsageError(f"{given} holds no heads: name a summary.json, a head or witness file")
    return known, witnesses
