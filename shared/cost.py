"""What a real run has cost, recomputed from its contract and the receipts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bract.shared import disclosed
from bract.shared.contract import Contract
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import entries, receipts
from bract.shared.privacy.events import Event
from bract.shared.privacy.receipts import Received

_RECEIPTS = "receipts.jsonl"


def is_shown(folder: Path, agreed: Contract) -> bool:
    """Returns whether receipts lie in a run folder with what sites showed of their ledgers."""
    kept = agreed.witness is not None and not agreed.simulation
    return kept and (folder / _RECEIPTS).exists()


def shown(folder: Path, agreed: Contract) -> tuple[Event, ...]:
    """Returns what a site that served every attempt was charged, as receipts show it.

    At the least: an attempt that nobody answered is not seen.

    Raises:
        VerificationFailed: where a receipt is not its site's, or stands behind no charge.
    """
    path = folder / _RECEIPTS
    found = receipts.read(path)
    try:
        charged = _charges(found, agreed)
    except VerificationFailed as error:
        raise VerificationFailed(f"{path}: {error}") from error
    # As a server counts: every attempt, and what a killed site paid again.
    attempts = max((one.attempt for one in found), default=0)
    completed = {one.receipt.round for one in found if one.counted}
    return entries.events_of_attempts(
        agreed,
        attempts=min(max(attempts, charged), agreed.max_attempts),
        completed=len(completed),
    )


def _charges(found: Sequence[Received], agreed: Contract) -> int:
    """Returns the most charges that the links of one site show."""
    numbers: dict[str, set[int]] = {}
    for one in found:
        terms = agreed.site(one.receipt.site)
        if terms is None:
            raise VerificationFailed(f"the contract lists no site {one.receipt.site!r}")
        trace = disclosed.check_update(one, agreed, terms)
        numbers.setdefault(terms.name, set()).update(trace.charges)
    return max(map(len, numbers.values()), default=0)
