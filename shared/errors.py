"""The errors a user may meet, each one line that names the value and the remedy.

BractError                 exit 1: the check or the run failed
├── UsageError             exit 2: the command, a file or a value is wrong
│   └── UnknownName        a model, key or experiment that does not exist; names the nearest
├── VerificationFailed     a signature, hash, chain or contract does not hold
│   └── RolledBack         a ledger lacks entries that were seen before
├── LedgerError            the ledger could not be used; nothing was charged
│   ├── LedgerBusy         another process holds it
│   └── LedgerUnwritable   the disk is full or the file cannot be written
├── ModelRejected          the model cannot be trained privately
└── Refusal                a site says no; carries a reason from a closed list and nothing else
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum


class BractError(Exception):
    """A failure that is shown to the user as one line."""

    exit_code = 1


class UsageError(BractError):
    """Bad usage: a command, a file or a value that must be changed."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is not in a known set.

    Example:
        >>> str(UnknownName("model", "cn", ["cnn", "mlp"]))
        "unknown model 'cn': did you mean 'cnn'? known: cnn, mlp"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")


class VerificationFailed(BractError):
    """A signature, a hash, a chain or a rule of the contract does not hold."""


class RolledBack(VerificationFailed):
    """A ledger lacks entries that this site or a server has seen: an older copy was put back."""


class LedgerError(BractError):
    """The ledger could not be read or written; nothing was charged."""


class LedgerBusy(LedgerError):
    """Another process holds the ledger for longer than the time allowed."""


class LedgerUnwritable(LedgerError):
    """The charge could not be made durable: a full disk, or a file that is read-only."""


class ModelRejected(BractError):
    """The model cannot be trained with per-example privacy."""


class Reason(StrEnum):
    """Why a site refuses: a closed list, so that a refusal carries no data of the site."""

    CONTRACT_UNTRUSTED = "contract-untrusted"
    NOT_IN_CONTRACT = "not-in-contract"
    POLICY_DOMAIN = "policy-domain"
    POLICY_MODEL = "policy-model"
    POLICY_MECHANISM = "policy-mechanism"
    POLICY_NOISE = "policy-noise"
    POLICY_SAMPLING = "policy-sampling"
    POLICY_DELTA = "policy-delta"
    POLICY_MENU = "policy-menu"
    POLICY_EVALUATION = "policy-evaluation"
    SIMULATION_ONLY = "simulation-only"
    DOMAIN_UNBOUNDED = "domain-unbounded"
    BUDGET_EXHAUSTED = "budget-exhausted"
    ATTEMPTS_EXHAUSTED = "attempts-exhausted"
    ROUND_OUT_OF_RANGE = "round-out-of-range"
    WEIGHTS_CHANGED = "weights-changed"
    WEIGHTS_INVALID = "weights-invalid"
    LEDGER_UNAVAILABLE = "ledger-unavailable"
    LEDGER_ROLLED_BACK = "ledger-rolled-back"
    WITNESS_INVALID = "witness-invalid"
    SITE_FAILED = "site-failed"

    @property
    def final(self) -> bool:
        """Whether asking again in a later round of the same contract is useless."""
        return self not in _PASSING


_PASSING = frozenset(
    {
        Reason.WEIGHTS_INVALID,
        Reason.LEDGER_UNAVAILABLE,
        Reason.WITNESS_INVALID,
        Reason.SITE_FAILED,
    }
)


class Refusal(BractError):
    """A site's refusal to train; only `reason` ever leaves the site.

    Args:
        reason: the entry of the closed list.
        detail: a remedy for the operator of this site; stays in the site's own log.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason = reason
        super().__init__(f"refused: {reason.value}: {detail}")
